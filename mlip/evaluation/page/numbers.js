// Arrays, matrices, number formats, and the errors that the rest draws.
const data = JSON.parse(document.getElementById("data").textContent);
const unpack = (text) => {
  const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  return new Float32Array(bytes.buffer);
};
for (const sample of data.samples) sample.positions = unpack(sample.positions);
for (const model of data.models)
  for (const orbit of Object.values(model.orbits))
    for (const key of ["energy", "energy_offset", "forces", "forces_label"]) orbit[key] = unpack(orbit[key]);

const state = {
  quantity: "forces", reference: "consensus", log: false, sphere: null, spin: -1, flat: false,
  sample: -1, pick: null, tab: null, view: null,
};
const S = data.samples.length;

// 3 x 3 matrices are arrays of three rows.
const multiply = (A, B) => A.map((row) => [0, 1, 2].map((k) => row[0] * B[0][k] + row[1] * B[1][k] + row[2] * B[2][k]));
const apply = (A, v) => A.map((row) => row[0] * v[0] + row[1] * v[1] + row[2] * v[2]);
const transpose = (A) => [0, 1, 2].map((k) => [A[0][k], A[1][k], A[2][k]]);
const rotation = (axis, angle) => {
  const c = Math.cos(angle), s = Math.sin(angle);
  if (axis === 0) return [[1, 0, 0], [0, c, -s], [0, s, c]];
  if (axis === 1) return [[c, 0, s], [0, 1, 0], [-s, 0, c]];
  return [[c, -s, 0], [s, c, 0], [0, 0, 1]];
};

// Rows of the view: right, up, towards the reader.
const HOME = [[-Math.SQRT1_2, Math.SQRT1_2, 0], [-0.2988, -0.2988, 0.9063], [0.6409, 0.6409, 0.4226]];
state.view = HOME;

const superscript = (n) => String(n).replace(/./g, (c) => "⁰¹²³⁴⁵⁶⁷⁸⁹⁻"["0123456789-".indexOf(c)]);
function format(x, digits = 3) {
  if (!Number.isFinite(x)) return "–";
  if (x === 0) return "0";
  const size = Math.floor(Math.log10(Math.abs(x)));
  if (size < -3 || size > 4) {
    const mantissa = x / 10 ** size;
    const text = mantissa.toFixed(1);
    return (text === "1.0" ? "" : text + "·") + "10" + superscript(size);
  }
  return x.toFixed(Math.max(0, digits - 1 - size));
}

// Powers of ten as such where there were many zeros.
function tickText(x) {
  const k = Math.floor(Math.log10(x) + 1e-9), mantissa = Number((x / 10 ** k).toPrecision(3));
  if (!(x > 0) || (k > -2 && k < 4)) return String(Number(x.toPrecision(3)));
  return (mantissa === 1 ? "" : `${mantissa}·`) + "10" + superscript(k);
}

const labelled = (orbit, s) =>
  state.quantity === "energy" ? !Number.isNaN(orbit.energy_offset[s])
    : orbit.forces_label.subarray(s * orbit.T, (s + 1) * orbit.T).some((x) => !Number.isNaN(x));

// Errors (T,) of one sample; against the consensus where there are no labels.
function errorsOf(orbit, s, reference = state.reference, quantity = state.quantity) {
  const T = orbit.T, out = new Float64Array(T);
  if (quantity === "energy") {
    const offset = reference === "label" && !Number.isNaN(orbit.energy_offset[s]) ? orbit.energy_offset[s] : 0;
    for (let t = 0; t < T; t++) out[t] = Math.abs(orbit.energy[s * T + t] + offset);
    return out;
  }
  const from = reference === "label" && labelled(orbit, s) ? orbit.forces_label : orbit.forces;
  for (let t = 0; t < T; t++) out[t] = from[s * T + t];
  return out;
}

// Errors of one sample, or (s < 0) their root mean square over all samples.
function errors(orbit, s, reference, quantity) {
  if (s >= 0) return errorsOf(orbit, s, reference, quantity);
  const sum = new Float64Array(orbit.T), count = new Float64Array(orbit.T);
  for (let k = 0; k < S; k++)
    errorsOf(orbit, k, reference, quantity).forEach((x, t) => {
      if (!Number.isNaN(x)) { sum[t] += x * x; count[t]++; }
    });
  return sum.map((x, t) => (count[t] ? Math.sqrt(x / count[t]) : NaN));
}

// Root of the weighted mean square over an orbit.
function rms(values, weights) {
  let sum = 0, total = 0;
  values.forEach((x, t) => { if (!Number.isNaN(x)) { sum += weights[t] * x * x; total += weights[t]; } });
  return total ? Math.sqrt(sum / total) : NaN;
}

// Errors (T,) of a sphere orbit as rows of theta, columns of phi.
function sphereMap(grid, values) {
  const [P, A] = grid.shape, K = grid.name === "rotations" ? grid.shape[2] : 1;
  const rows = [];
  for (let p = 0; p < P; p++) {
    const row = [];
    for (let a = 0; a < A; a++) {
      let sum = 0;
      for (let k = 0; k < K; k++) sum += values[(p * A + a) * K + k] ** 2 / K;
      row.push(K > 1 && state.spin >= 0 ? values[(p * A + a) * K + state.spin] : Math.sqrt(sum));
    }
    rows.push(row);
  }
  if (grid.name !== "reflections") return rows;
  return rows.map((row, p) => [...row, ...rows[P - 1 - p]]); // n and -n are the same plane
}

// Colours: t in [0, 1] -> index into the table.
const colours = data.colours.match(/.{6}/g).map((h) => [0, 2, 4].map((k) => parseInt(h.slice(k, k + 2), 16)));
const css = (t) => {
  const [r, g, b] = colours[Math.max(0, Math.min(255, Math.round(t * 255)))];
  return `rgb(${r},${g},${b})`;
};
const DECADES = 8;
const ROUND_OFF = 0.05; // meV; a linear scale that ended below would make patterns of round-off
function makeScale(low, high) {
  high = Math.max(high, state.log ? 1e-12 : ROUND_OFF);
  if (!state.log) return { low: 0, high, log: false, of: (x) => x / high };
  low = Math.max(Math.min(low, high / 3), high * 10 ** -DECADES);
  const a = Math.log10(low), b = Math.log10(high);
  return { low, high, log: true, of: (x) => (Math.log10(Math.max(x, 1e-30)) - a) / (b - a) };
}
function ticks(scale, most) {
  const out = [];
  if (scale.log) {
    const a = Math.ceil(Math.log10(scale.low) - 1e-9), b = Math.floor(Math.log10(scale.high) + 1e-9);
    if (b - a >= 2) {
      const step = Math.max(1, Math.ceil((b - a) / most));
      for (let k = a; k <= b; k += step) out.push(10 ** k);
      return out;
    }
    for (let k = a - 1; k <= b; k++)
      for (const m of [1, 2, 5]) if (m * 10 ** k >= scale.low && m * 10 ** k <= scale.high) out.push(m * 10 ** k);
    return out;
  }
  const raw = (scale.high - scale.low) / most, size = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].find((m) => m * size >= raw) * size;
  for (let x = Math.ceil(scale.low / step) * step; x <= scale.high * 1.0001; x += step) out.push(x);
  return out;
}
