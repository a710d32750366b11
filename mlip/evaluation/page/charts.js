// Colour bar, map of the samples, curves.
const FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif';
let inks = {};
const ink = (name) => (inks[name] ??= getComputedStyle(document.documentElement).getPropertyValue(name).trim());
const modelInk = (m) => ink(`--m${m % 6}`);

function fit(canvas, width, height) {
  const ratio = window.devicePixelRatio || 1;
  canvas.style.height = `${height}px`;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, height);
  return context;
}

const unit = () => data.units[state.quantity];
const word = () => (state.quantity === "forces" ? "force" : "energy");

function drawBar(canvas, scale) {
  const width = canvas.clientWidth, context = fit(canvas, width, 46), left = 4, right = width - 4;
  for (let x = left; x < right; x++) {
    context.fillStyle = css((x - left) / (right - left));
    context.fillRect(x, 0, 1.5, 14);
  }
  context.font = `13px ${FONT}`;
  context.textBaseline = "top";
  context.fillStyle = ink("--ink");
  context.strokeStyle = ink("--quiet");
  const title = `${word()} error / ${unit()}`;
  const free = right - context.measureText(title).width - 16;
  context.textAlign = "right";
  context.fillText(title, right, 22);
  for (const x of ticks(scale, Math.max(2, width / 110))) {
    const at = left + scale.of(x) * (right - left);
    context.beginPath();
    context.moveTo(at, 14);
    context.lineTo(at, 19);
    context.stroke();
    const text = tickText(x), half = context.measureText(text).width / 2;
    context.textAlign = "center";
    if (at + half < free) context.fillText(text, Math.max(at, left + half), 22);
  }
}

// Principal components of the samples' orbits; the colour is the sample's error on the shared scale.
class Scatter {
  constructor(canvas, m) {
    this.canvas = canvas;
    this.m = m;
  }

  draw(scale) {
    const width = this.canvas.clientWidth, height = 190, context = fit(this.canvas, width, height);
    const set = data.models[this.m].maps[`${state.quantity} ${state.reference}`];
    const pad = { left: 14, right: 14, top: 12, bottom: 26 };
    const xs = set.points.map((p) => p[0]), ys = set.points.map((p) => p[1]);
    const spread = (v) => {
      const low = Math.min(...v), high = Math.max(...v), room = (high - low || 1) * 0.06;
      return [low - room, high + room];
    };
    const [x0, x1] = spread(xs), [y0, y1] = spread(ys);
    const X = (x) => pad.left + ((x - x0) / (x1 - x0)) * (width - pad.left - pad.right);
    const Y = (y) => height - pad.bottom - ((y - y0) / (y1 - y0)) * (height - pad.top - pad.bottom);
    context.strokeStyle = ink("--line");
    context.lineWidth = 1;
    context.strokeRect(0.5, 0.5, width - 1, height - 20);
    context.font = `12px ${FONT}`;
    context.fillStyle = ink("--quiet");
    context.textBaseline = "bottom";
    context.textAlign = "left";
    context.fillText("samples, by likeness of their orbits", 2, height);
    context.textAlign = "right";
    if (width > 330) context.fillText(`${set.explained.map((x) => `${Math.round(100 * x)} %`).join(" + ")} of variance`, width - 2, height);
    this.places = [];
    set.points.forEach((p, s) => {
      const x = X(p[0]), y = Y(p[1]);
      this.places.push([x, y]);
      context.beginPath();
      context.arc(x, y, 5.5, 0, 2 * Math.PI);
      context.fillStyle = css(scale.of(sampleError(this.m, s)));
      context.fill();
      context.strokeStyle = ink("--quiet");
      context.lineWidth = 0.8;
      context.stroke();
    });
    if (state.sample >= 0) {
      const [x, y] = this.places[state.sample];
      context.beginPath();
      context.arc(x, y, 9, 0, 2 * Math.PI);
      context.lineWidth = 2.5;
      context.strokeStyle = ink("--accent");
      context.stroke();
    }
  }

  // Number of the sample under the pointer, or -1.
  find(event) {
    const box = this.canvas.getBoundingClientRect();
    let best = -1, least = 14;
    this.places.forEach(([x, y], s) => {
      const d = Math.hypot(event.clientX - box.left - x, event.clientY - box.top - y);
      if (d < least) [best, least] = [s, d];
    });
    return best;
  }
}

const mapOrbit = () => state.sphere ?? Object.keys(data.orbits)[0];
function sampleError(m, s, reference) {
  const name = mapOrbit();
  return rms(errors(data.models[m].orbits[name], s, reference), data.orbits[name].weights);
}

const AXES = { plane: "rotation about z / degrees", translations: "translation / Å", permutations: "random order of the atoms", cells: "" };

function drawChart(canvas) {
  const width = canvas.clientWidth, height = 330, context = fit(canvas, width, height);
  if (!state.tab) return null;
  const grid = data.orbits[state.tab], key = Object.keys(grid.axes)[0], axis = grid.axes[key];
  const named = typeof axis[0] === "string", closed = key === "angle"; // a full turn ends where it began
  const xs = named ? axis.map((_, k) => k) : closed ? [...axis, 360] : axis;
  const series = data.models.map((model) => {
    const values = Array.from(errors(model.orbits[state.tab], state.sample));
    return closed ? [...values, values[0]] : values;
  });
  const all = series.flat().filter((x) => Number.isFinite(x));
  const pad = { left: 80, right: 16, top: 14, bottom: named ? 118 : 46 };
  context.font = `13px ${FONT}`;
  context.fillStyle = ink("--quiet");
  if (!all.length) {
    context.textAlign = "center";
    context.fillText("This structure has no such orbit.", width / 2, height / 2);
    return null;
  }
  const high = Math.max(...all) * (state.log ? 1.6 : 1.06);
  const scale = makeScale(Math.min(...all.map((x) => Math.max(x, 1e-12))) / 1.6, high);
  const Y = (y) => height - pad.bottom - Math.max(0, scale.of(y)) * (height - pad.top - pad.bottom);
  const room = named ? 0.5 : 0, x0 = Math.min(...xs) - room, x1 = Math.max(...xs) + room;
  const X = (x) => pad.left + ((x - x0) / (x1 - x0 || 1)) * (width - pad.left - pad.right);
  context.lineWidth = 1;
  context.textAlign = "right";
  context.textBaseline = "middle";
  for (const y of ticks(scale, 6)) {
    context.strokeStyle = ink("--grid");
    context.beginPath();
    context.moveTo(pad.left, Y(y));
    context.lineTo(width - pad.right, Y(y));
    context.stroke();
    context.fillText(tickText(y), pad.left - 8, Y(y));
  }
  context.textBaseline = "top";
  context.textAlign = "center";
  const marks = named ? xs : closed ? [0, 60, 120, 180, 240, 300, 360] : ticks({ low: x0, high: x1 }, 8);
  for (const x of marks) {
    if (x < x0 || x > x1) continue;
    if (named) {
      context.save();
      context.translate(X(x) + 4, height - pad.bottom + 8);
      context.rotate(-Math.PI / 4);
      context.textAlign = "right";
      context.fillText(axis[x], 0, 0);
      context.restore();
    } else context.fillText(String(Number(x.toPrecision(4))), X(x), height - pad.bottom + 8);
  }
  context.fillText(AXES[state.tab] ?? "", pad.left + (width - pad.left - pad.right) / 2, height - 17);
  context.save();
  context.translate(13, pad.top + (height - pad.top - pad.bottom) / 2);
  context.rotate(-Math.PI / 2);
  context.textBaseline = "middle";
  context.fillText(`${word()} error / ${unit()}`, 0, 0);
  context.restore();
  series.forEach((values, m) => {
    context.strokeStyle = context.fillStyle = modelInk(m);
    context.lineWidth = 2.2;
    context.lineJoin = "round";
    if (grid.kind === "curve") {
      context.beginPath();
      values.forEach((y, k) => context[k ? "lineTo" : "moveTo"](X(xs[k]), Y(y)));
      context.stroke();
    } else
      values.forEach((y, k) => {
        if (!Number.isFinite(y)) return;
        context.beginPath();
        context.arc(X(xs[k]), Y(y), 4.5, 0, 2 * Math.PI);
        context.fill();
      });
  });
  return { xs, axis: closed ? xs : axis, series, X, key };
}
