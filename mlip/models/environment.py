"""Environment: a plain network on the raw vectors of an atom's neighbourhood, nothing more.

The energy of atom i is a function of the vectors and elements around it, without messages between
atoms and without any notion of a rotation:

    t_ij = W ( silu(W [r_ij / |r_ij|, B(r_ij)] + s_j) * W B(r_ij) )                  neighbours
    h_i  = s_i + n^-1/2 W sum_j f_ij t_ij                                            the atom
    h_i <- h_i + W sum_j a_ij V t_ij,    h_i <- h_i + MLP(h_i)                       T rounds
    a_ij = f_ij exp(q_i . k_ij) / (1 + sum_j f_ij exp(q_i . k_ij))
    E_i  = MLP(h_i) c_i^2 / (1 + c_i^2),    c_i = sum_j f_ij

s are embeddings of the elements, B Bessel functions, f the envelope, n the mean number of
neighbours; q is linear in h_i, and k, V in t_ij.  The atom looks at its neighbours T times, each
time asking for what it has found before.

It is the backbone on which ways to symmetry can be compared: bare, with augmentation, or made exact
by averages over frames (``mlip.wrappers.frame_averaging``), which are cheap where one atom's energy
needs one environment.

Symmetry: translations and permutations exactly; rotations and reflections only learned.
Cost: O(E D^2) + O(T (E D + N H^2)).
"""

from __future__ import annotations

import math

from pydantic import Field, model_validator
from torch import Tensor, nn

from mlip.config import Config
from mlip.data.graph import AtomicGraph, NodeOutput
from mlip.nn.attention import attend, log_envelope
from mlip.nn.neighborhoods import gather_neighborhoods
from mlip.nn.radial import bessel


class EnvironmentConfig(Config):
    """Hyperparameters of Environment, the important ones first."""

    cutoff: float = Field(5.0, gt=0, description="neighbours up to this distance, angstrom")
    hidden: int = Field(128, ge=4, le=4096, description="H, width of an atom's state")
    edge_hidden: int = Field(64, ge=4, le=4096, description="D, width of a neighbour's token")
    num_rounds: int = Field(2, ge=0, le=32, description="T, looks at the neighbours")
    num_heads: int = Field(4, ge=1, le=64, description="of a look; divides D")
    num_basis: int = Field(8, ge=2, le=64, description="Bessel functions")
    stretch: float = Field(
        2.0, ge=0, le=10, description="Bessel functions are 1 + this times finer at short distances"
    )
    avg_num_neighbors: float = Field(
        20.0, gt=0, description="scale of sums over neighbours, from the training set"
    )

    @model_validator(mode="after")
    def _consistent(self) -> EnvironmentConfig:
        if self.edge_hidden % self.num_heads:
            raise ValueError(
                f"edge_hidden={self.edge_hidden} cannot be shared by num_heads={self.num_heads}"
            )
        return self


class Environment(nn.Module):
    """The model; see the module's docstring for the equations."""

    def __init__(self, config: EnvironmentConfig) -> None:
        super().__init__()
        c = self.config = config
        H, D = c.hidden, c.edge_hidden
        self.scale = 1 / math.sqrt(c.avg_num_neighbors)
        self.embed = nn.Embedding(119, H)  # one row per Z, row 0 unused
        self.species = nn.Linear(H, D)
        self.direction = nn.Linear(3, D, bias=False)
        self.radial = nn.Linear(c.num_basis, 2 * D)
        self.token = nn.Linear(D, D)
        self.density = nn.Linear(D, H, bias=False)
        self.rounds = nn.ModuleList(Look(c) for _ in range(c.num_rounds))
        self.readout = mlp(H, H, 1)
        nn.init.zeros_(
            self.readout[-1].get_parameter("weight")
        )  # training starts from the reference energies

    @property
    def receptive_field(self) -> float:
        """Angstrom; no atom farther away changes an atom's energy."""
        return self.config.cutoff

    @property
    def exact_symmetry(self) -> bool:
        """Rotations and reflections are learned."""
        return False

    def forward(self, graph: AtomicGraph) -> NodeOutput:
        c = self.config
        Z = graph.atomic_numbers
        N = Z.shape[0]  # unlike len(), a symbol to a compiler
        hood = gather_neighborhoods(graph.vectors, graph.edge_index, N, c.cutoff)
        r = hood.vectors.norm(dim=-1, keepdim=True)  # (N, K, 1)
        x = r[..., 0] / c.cutoff
        log_fade = log_envelope(x)
        fade = log_fade.exp()
        s = self.embed(Z)
        sj = self.species(s).index_select(0, hood.neighbors).view(*x.shape, -1)
        a, gate = self.radial(bessel(x, c.num_basis, c.stretch)).chunk(2, dim=-1)
        a = a + sj + self.direction(hood.vectors / r)
        t = self.token(nn.functional.silu(a) * gate)  # (N, K, D)
        h = s + self.density((fade[:, None, :] @ t)[:, 0] * self.scale)  # (N, H)
        # The fused kernel has no second derivative, and of a program it asks for sizes.
        fused = not (self.training or graph.vectors.dim() == 3)
        for look in self.rounds:
            h = look(h, t, log_fade, fused=fused)
        # An atom without neighbours has energy zero; squared, so that the last one leaves gently.
        count = fade.sum(dim=1).square()
        energy = self.readout(h).squeeze(-1) * (count / (1 + count))
        return NodeOutput(energy=energy, features=h)


def mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """Norm and two layers."""
    return nn.Sequential(
        nn.LayerNorm(inputs, bias=False),
        nn.Linear(inputs, hidden),
        nn.SiLU(),
        nn.Linear(hidden, outputs, bias=False),
    )


class Look(nn.Module):
    """Attention of the atom to its neighbours, and a network on the atom."""

    def __init__(self, c: EnvironmentConfig) -> None:
        super().__init__()
        H, D = c.hidden, c.edge_hidden
        self.heads = c.num_heads
        self.norm = nn.LayerNorm(H, bias=False)
        self.query = nn.Linear(H, D, bias=False)
        self.key_value = nn.Linear(D, 2 * D, bias=False)
        self.out = nn.Linear(D, H, bias=False)
        self.mlp = mlp(H, 2 * H, H)

    def forward(self, h: Tensor, t: Tensor, log_fade: Tensor, *, fused: bool) -> Tensor:
        """States (N, H), tokens (N, K, D) and the logarithm of their envelope (N, K)."""
        # A slot before the neighbours, with logit and value zero, keeps the denominator above zero.
        kv = nn.functional.pad(self.key_value(t), (0, 0, 1, 0)).unflatten(-1, (self.heads, -1))
        k, v = kv.transpose(1, 2).chunk(2, dim=-1)  # (N, heads, K + 1, d)
        q = self.query(self.norm(h)).unflatten(-1, (self.heads, 1, -1))  # (N, heads, 1, d)
        bias = nn.functional.pad(log_fade, (1, 0))[:, None]
        o = attend(q, k, v, bias, fused=fused)
        h = h + self.out(o.flatten(1))
        return h + self.mlp(h)
