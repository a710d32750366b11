// Atoms as shaded discs with bonds, in the pose that the model sees.
const BOND = 1.2; // of the sum of covalent radii

function prepareStructure(sample) {
  if (sample.bonds) return;
  const n = sample.numbers.length, r = sample.positions, centre = [0, 0, 0];
  for (let i = 0; i < n; i++) for (let k = 0; k < 3; k++) centre[k] += r[3 * i + k] / n;
  const boxed = sample.pbc.some(Boolean);
  const corner = boxed ? [0, 1, 2].map((k) => (sample.cell[0][k] + sample.cell[1][k] + sample.cell[2][k]) / 2) : centre;
  sample.at = Array.from({ length: n }, (_, i) => [0, 1, 2].map((k) => r[3 * i + k] - corner[k]));
  sample.box = [];
  if (boxed) {
    const [a, b, c] = sample.cell, point = (i, j, k) => [0, 1, 2].map((m) => i * a[m] + j * b[m] + k * c[m] - corner[m]);
    for (const i of [0, 1]) for (const j of [0, 1]) {
      sample.box.push([point(0, i, j), point(1, i, j)], [point(i, 0, j), point(i, 1, j)], [point(i, j, 0), point(i, j, 1)]);
    }
  }
  sample.bonds = [];
  if (n <= 600)
    for (let i = 0; i < n; i++)
      for (let j = 0; j < i; j++) {
        const d = Math.hypot(...sample.at[i].map((x, k) => x - sample.at[j][k]));
        const limit = BOND * (data.elements[sample.numbers[i]].radius + data.elements[sample.numbers[j]].radius);
        if (d < limit) sample.bonds.push([i, j]);
      }
  const far = [...sample.at, ...sample.box.flat()];
  sample.size = Math.max(1.5, ...far.map((v) => Math.hypot(...v))) + 0.5;
}

// The image of the structure that belongs to a direction of the sphere.
function pose() {
  if (!state.pick) return [[1, 0, 0], [0, 1, 0], [0, 0, 1]];
  const [x, y, z] = state.pick;
  if (state.sphere === "reflections")
    return [0, 1, 2].map((i) => [0, 1, 2].map((j) => (i === j ? 1 : 0) - 2 * state.pick[i] * state.pick[j]));
  const spin = state.spin < 0 ? 0 : (data.orbits.rotations.axes.spin[state.spin] * Math.PI) / 180, phi = Math.atan2(y, x);
  return multiply(multiply(rotation(2, phi), rotation(1, Math.acos(z))), rotation(2, spin - phi));
}

function drawStructure(canvas, sample) {
  prepareStructure(sample);
  const width = canvas.clientWidth, height = 330, context = fit(canvas, width, height);
  const whole = multiply(state.view, pose()), zoom = (Math.min(width, height) / 2 - 14) / sample.size;
  const place = (v) => [width / 2 + v[0] * zoom, height / 2 - v[1] * zoom];
  const at = sample.at.map((v) => apply(whole, v));
  const things = [];
  sample.box.forEach(([p, q]) => {
    const [a, b] = [apply(whole, p), apply(whole, q)];
    things.push([-1e9, () => {
      context.beginPath();
      context.moveTo(...place(a));
      context.lineTo(...place(b));
      context.lineWidth = 1;
      context.strokeStyle = ink("--quiet");
      context.stroke();
    }]);
  });
  for (const [i, j] of sample.bonds) {
    const middle = at[i].map((x, k) => (x + at[j][k]) / 2);
    for (const k of [i, j]) things.push([(middle[2] + at[k][2]) / 2 - 0.05, () => stick(at[k], middle, sample.numbers[k])]);
  }
  at.forEach((v, i) => things.push([v[2], () => ball(v, sample.numbers[i])]));
  if (state.pick) things.push([apply(state.view, state.pick)[2] < 0 ? -1e8 : 1e8, () => arrow(context, place, sample.size)]);
  things.sort((p, q) => p[0] - q[0]).forEach(([, draw]) => draw());
  triad(context, height);

  function stick(p, q, Z) {
    context.lineCap = "round";
    for (const [w, colour] of [[0.2, "rgba(0,0,0,0.45)"], [0.15, data.elements[Z].colour]]) {
      context.beginPath();
      context.moveTo(...place(p));
      context.lineTo(...place(q));
      context.lineWidth = w * zoom;
      context.strokeStyle = colour;
      context.stroke();
    }
  }
  function ball(v, Z) {
    const [x, y] = place(v), radius = (0.17 + 0.27 * data.elements[Z].radius) * zoom;
    const light = context.createRadialGradient(x - radius * 0.35, y - radius * 0.4, radius * 0.1, x, y, radius);
    light.addColorStop(0, "#fff");
    light.addColorStop(0.35, data.elements[Z].colour);
    light.addColorStop(1, data.elements[Z].dark);
    context.beginPath();
    context.arc(x, y, radius, 0, 2 * Math.PI);
    context.fillStyle = light;
    context.fill();
    context.lineWidth = 0.8;
    context.strokeStyle = "rgba(0,0,0,0.5)";
    context.stroke();
  }
}

function triad(context, height) {
  context.font = `600 12px ${FONT}`;
  context.textAlign = "center";
  context.textBaseline = "middle";
  ["x", "y", "z"].forEach((name, k) => {
    const v = apply(state.view, [0, 1, 2].map((m) => (m === k ? 1 : 0)));
    context.beginPath();
    context.moveTo(40, height - 40);
    context.lineTo(40 + 22 * v[0], height - 40 - 22 * v[1]);
    context.lineWidth = 1.5;
    context.strokeStyle = ink("--quiet");
    context.stroke();
    context.fillStyle = ink("--ink");
    context.fillText(name, 40 + 31 * v[0], height - 40 - 31 * v[1]);
  });
}

function arrow(context, place, size) {
  const v = apply(state.view, state.pick).map((x) => x * size);
  const [x, y] = place(v), [x0, y0] = place(v.map((q) => q * 0.55)), angle = Math.atan2(y - y0, x - x0);
  context.strokeStyle = context.fillStyle = ink("--accent");
  context.lineWidth = 2.5;
  context.beginPath();
  context.moveTo(x0, y0);
  context.lineTo(x, y);
  context.stroke();
  context.beginPath();
  context.moveTo(x + 6 * Math.cos(angle), y + 6 * Math.sin(angle));
  for (const turn of [2.5, -2.5]) context.lineTo(x + 8 * Math.cos(angle + turn), y + 8 * Math.sin(angle + turn));
  context.fill();
}
