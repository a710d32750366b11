// Controls, links between the views, redrawing.
const TITLES = { rotations: "Rotations", reflections: "Reflections", plane: "In-plane rotation", translations: "Translation", permutations: "Permutation", cells: "Cell choice" };
const $ = (id) => document.getElementById(id);
const make = (tag, text, className) => {
  const node = document.createElement(tag);
  if (text !== undefined) node.textContent = text; // never as HTML: names come from files
  if (className) node.className = className;
  return node;
};
const names = Object.keys(data.orbits);
const spheres = names.filter((name) => data.orbits[name].kind === "sphere");
const tabs = names.filter((name) => data.orbits[name].kind !== "sphere"
  && data.models.some((model) => model.orbits[name].forces.some((x) => !Number.isNaN(x))));
state.sphere = spheres[0] ?? null;
state.tab = tabs[0] ?? null;
const anyLabels = () => { // of the quantity shown
  const orbit = data.models[0].orbits[names[0]];
  return data.samples.some((_, s) => labelled(orbit, s));
};

let cards = [], chart = null, textures = [], scale = null, pending = false;

function build() {
  $("source").textContent = data.source;
  const main = $("models");
  main.style.maxWidth = `${600 * data.models.length}px`;
  data.models.forEach((model, m) => {
    const card = make("article", undefined, "card"), head = make("h2");
    const dot = make("span", undefined, "dot");
    head.append(dot, make("span", model.name));
    card.append(head);
    const canvas = make("canvas", undefined, "grab"), numbers = make("div", undefined, "numbers"), map = make("canvas");
    canvas.tabIndex = 0;
    canvas.setAttribute("aria-label", `error of ${model.name} on the sphere`);
    map.setAttribute("aria-label", `samples of ${model.name}`);
    if (state.sphere) card.append(canvas);
    card.append(numbers, map);
    main.append(card);
    const item = { dot, numbers, sphere: new Sphere(canvas), scatter: new Scatter(map, m) };
    cards.push(item);
    turnable(canvas, (event) => {
      state.pick = item.sphere.direction(event);
      redraw();
    });
    canvas.addEventListener("pointermove", (event) => {
      const v = !event.buttons && item.sphere.direction(event);
      tip(event, v && sphereTip(m, v));
    });
    map.addEventListener("click", (event) => choose(item.scatter.find(event)));
    map.addEventListener("pointermove", (event) => {
      const s = item.scatter.find(event);
      map.style.cursor = s < 0 ? "default" : "pointer";
      tip(event, s >= 0 && `${data.samples[s].name}\n${format(sampleError(m, s))} ${unit()}`);
    });
    for (const node of [canvas, map]) node.addEventListener("pointerleave", (event) => tip(event, null));
  });
  turnable($("structure"), () => {});
  $("chart").addEventListener("pointermove", chartTip);
  $("chart").addEventListener("pointerleave", (event) => tip(event, null));
  $("theme").addEventListener("click", () => setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark"));
  window.addEventListener("resize", redraw);
  document.addEventListener("keydown", (event) => {
    if (event.target !== document.body || !["ArrowLeft", "ArrowRight"].includes(event.key)) return;
    const step = event.key === "ArrowRight" ? 1 : -1;
    choose(((state.sample + 1 + step + S + 1) % (S + 1)) - 1);
  });
  const scheme = window.matchMedia("(prefers-color-scheme: dark)");
  scheme.addEventListener("change", () => setTheme(scheme.matches ? "dark" : "light"));
  readHash();
  setTheme(document.documentElement.dataset.theme || (scheme.matches ? "dark" : "light"));
}

// Settings may stand in the address: page.html#quantity=energy&sample=3
function readHash() {
  const set = new URLSearchParams(location.hash.slice(1));
  if (["energy", "forces"].includes(set.get("quantity"))) state.quantity = set.get("quantity");
  if (["label", "consensus"].includes(set.get("reference"))) state.reference = set.get("reference");
  if (!anyLabels()) state.reference = "consensus";
  if (spheres.includes(set.get("sphere"))) state.sphere = set.get("sphere");
  if (tabs.includes(set.get("orbit"))) state.tab = set.get("orbit");
  if (set.has("sample")) state.sample = Math.max(-1, Math.min(S - 1, Number(set.get("sample")) | 0));
  if (["light", "dark"].includes(set.get("theme"))) document.documentElement.dataset.theme = set.get("theme");
  state.flat = set.get("projection") === "map";
  state.log = set.get("scale") === "log";
  const turns = data.orbits.rotations?.axes.spin.length ?? 0;
  if (set.has("turn")) state.spin = Math.max(-1, Math.min(turns - 1, Number(set.get("turn")) | 0));
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  inks = {};
  redraw();
}

function choose(s) {
  state.sample = s;
  redraw();
}

// Drag or arrow keys turn the view; a click without a drag is a choice.
function turnable(canvas, click) {
  let last = null, moved = 0;
  const turn = (dx, dy) => {
    state.view = multiply(multiply(rotation(0, dy * 0.008), rotation(1, dx * 0.008)), state.view);
    redraw(false);
  };
  canvas.addEventListener("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    last = [event.clientX, event.clientY];
    moved = 0;
  });
  canvas.addEventListener("pointermove", (event) => {
    if (!last) return;
    const dx = event.clientX - last[0], dy = event.clientY - last[1];
    moved += Math.abs(dx) + Math.abs(dy);
    last = [event.clientX, event.clientY];
    if (moved > 3) turn(dx, dy);
  });
  canvas.addEventListener("pointerup", (event) => {
    if (last && moved <= 3) click(event);
    last = null;
  });
  canvas.addEventListener("dblclick", () => {
    state.view = HOME;
    state.pick = null;
    redraw();
  });
  canvas.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: [-12, 0], ArrowRight: [12, 0], ArrowUp: [0, -12], ArrowDown: [0, 12] }[event.key];
    if (step) { turn(...step); event.preventDefault(); }
  });
}

function segments(parent, title, options, current, set) {
  const box = make("span", undefined, "segments");
  for (const [value, text, off] of options) {
    const button = make("button", text);
    button.type = "button";
    button.setAttribute("aria-pressed", String(value === current));
    button.disabled = Boolean(off);
    button.addEventListener("click", () => { set(value); redraw(); });
    box.append(button);
  }
  wrap(parent, title, box);
}
function wrap(parent, title, node) {
  const control = make("label", undefined, "control");
  if (title) control.append(make("span", title, "name"));
  control.append(node);
  parent.append(control);
}
function choice(parent, title, options, current, set) {
  const box = make("select");
  for (const [value, text] of options) {
    const option = make("option", text);
    option.value = value;
    option.selected = value === current;
    box.append(option);
  }
  box.addEventListener("change", () => { set(Number(box.value)); redraw(); });
  wrap(parent, title, box);
}

function controls() {
  const nav = $("controls"), off = !anyLabels();
  nav.replaceChildren();
  choice(nav, "", [[-1, `all ${S} samples`], ...data.samples.map((s, k) => [k, s.name])], state.sample, (v) => (state.sample = v));
  segments(nav, "error of", [["forces", "Forces"], ["energy", "Energy"]], state.quantity, (v) => (state.quantity = v));
  segments(nav, "against", [["label", "Labels", off], ["consensus", "Consensus"]], off ? "consensus" : state.reference, (v) => (state.reference = v));
  segments(nav, "", [[false, "Linear"], [true, "Log"]], state.log, (v) => (state.log = v));
  if (spheres.length) {
    segments(nav, "", spheres.map((name) => [name, TITLES[name]]), state.sphere, (v) => { state.sphere = v; state.pick = null; });
    segments(nav, "", [[false, "Globe"], [true, "Map"]], state.flat, (v) => (state.flat = v));
  }
  if (state.sphere === "rotations")
    choice(nav, "turn", [[-1, "all"], ...data.orbits.rotations.axes.spin.map((x, k) => [k, `${format(x)}°`])], state.spin, (v) => (state.spin = v));
}

function redraw(all = true) {
  state.stale = state.stale || all;
  if (pending) return;
  pending = true;
  requestAnimationFrame(() => {
    pending = false;
    if (state.stale) refresh();
    state.stale = false;
    if (state.sphere) cards.forEach((card, m) => card.sphere.draw(textures[m]));
    drawStructure($("structure"), data.samples[shown()]);
  });
}

// The structure on view: the chosen sample, or else the one with the largest error of any model.
function shown() {
  if (state.sample >= 0) return state.sample;
  let worst = 0, most = -1;
  data.models.forEach((_, m) => data.samples.forEach((_, s) => {
    const error = sampleError(m, s, "consensus");
    if (error > most) [worst, most] = [s, error];
  }));
  return worst;
}

function refresh() {
  if (!anyLabels()) state.reference = "consensus";
  controls();
  const name = mapOrbit(), grid = data.orbits[name];
  const values = data.models.map((model) => errors(model.orbits[name], state.sample));
  const maps = state.sphere ? values.map((v) => sphereMap(grid, v)) : values.map((v) => [Array.from(v)]);
  const all = maps.flat(2).filter(Number.isFinite);
  scale = makeScale(Math.min(...all), Math.max(...all));
  if (state.sphere) textures = maps.map((map) => texture(grid, map, scale));
  drawBar($("bar").firstElementChild, scale);
  cards.forEach((card, m) => {
    card.dot.style.background = modelInk(m);
    numbers(card.numbers, m, values[m], grid);
    card.scatter.draw(scale);
  });
  const s = shown(), sample = data.samples[s];
  $("structure-title").textContent = sample.name;
  const where = state.sample < 0 ? "the largest symmetry error · " : "";
  const hint = state.pick ? (state.sphere === "reflections" ? "mirrored at the chosen plane" : "in the pose chosen on the sphere") : "click a sphere for a pose";
  $("structure-note").textContent = `${sample.formula} · ${where}${hint}`;
  const box = $("tabs"), legend = $("legend");
  box.replaceChildren();
  for (const tab of tabs) {
    const button = make("button", TITLES[tab]);
    button.type = "button";
    button.setAttribute("aria-pressed", String(tab === state.tab));
    button.addEventListener("click", () => { state.tab = tab; redraw(); });
    box.append(button);
  }
  legend.replaceChildren();
  data.models.forEach((model, m) => {
    const item = make("span"), dot = make("span", undefined, "dot");
    dot.style.background = modelInk(m);
    item.append(dot, make("span", model.name));
    legend.append(item);
  });
  chart = drawChart($("chart"));
  table();
  notes();
}

function numbers(box, m, values, grid) {
  const orbit = data.models[m].orbits[grid.name];
  const spread = rms(errors(orbit, state.sample, "consensus"), grid.weights);
  const which = state.sample >= 0 ? [state.sample] : data.samples.map((_, s) => s);
  const known = which.filter((s) => labelled(orbit, s));
  const square = (reference) => known.reduce((sum, s) => sum + rms(errorsOf(orbit, s, reference), grid.weights) ** 2, 0);
  const share = known.length ? (100 * square("consensus")) / (square("label") || 1) : NaN;
  box.replaceChildren();
  const cell = (value, text) => {
    const item = make("div");
    item.append(make("b", value), make("span", text.replace("/", "/\u2060"))); // no line ends in a unit
    box.append(item);
  };
  cell(format(spread), `symmetry error, ${unit()}`);
  if (known.length) {
    cell(share < 0.01 ? "< 0.01 %" : `${format(share)} %`, "of the squared error");
    cell(format(Math.sqrt(square("label") / known.length)), `error to labels, ${unit()}`);
  } else cell(format(Math.max(...values)), `at worst, ${unit()}`);
}

function table() {
  const body = $("table");
  body.replaceChildren();
  const head = make("tr"), present = names.filter((name) => spheres.includes(name) || tabs.includes(name));
  head.append(make("th", `${word()} / ${unit()}`), ...present.map((name) => make("th", TITLES[name])));
  body.append(head);
  for (const model of data.models) {
    const row = make("tr");
    row.append(make("td", model.name));
    for (const name of present) row.append(make("td", format(rms(errors(model.orbits[name], state.sample, "consensus"), data.orbits[name].weights))));
    body.append(row);
  }
}

function notes() {
  const orbit = data.models[0].orbits[names[0]];
  const without = data.samples.filter((_, s) => !labelled(orbit, s)).length;
  const parts = ["Consensus: mean of the predictions over the orbit, brought back to one pose. Drag to turn, double-click to reset, arrow keys for the next sample."];
  if (state.reference === "label" && without) parts.push(`${without} of ${S} samples have no ${word()} labels and are compared with their consensus.`);
  if (!anyLabels()) parts.push(`No sample has ${word()} labels: all errors are against the consensus.`);
  $("notes").textContent = parts.join(" ");
}

function sphereTip(m, v) {
  const grid = data.orbits[state.sphere], map = sphereMap(grid, errors(data.models[m].orbits[state.sphere], state.sample));
  const theta = (Math.acos(v[2]) * 180) / Math.PI, phi = ((Math.atan2(v[1], v[0]) * 180) / Math.PI + 360) % 360;
  const p = grid.axes.theta.reduce((best, x, k) => (Math.abs(x - theta) < Math.abs(grid.axes.theta[best] - theta) ? k : best), 0);
  const a = Math.round((phi / 360) * map[0].length) % map[0].length;
  return `${format(map[p][a])} ${unit()}\ntilt ${Math.round(theta)}°, azimuth ${Math.round(phi)}°`;
}

function chartTip(event) {
  if (!chart) return;
  const x = event.clientX - event.target.getBoundingClientRect().left;
  const k = chart.xs.reduce((best, v, i) => (Math.abs(chart.X(v) - x) < Math.abs(chart.X(chart.xs[best]) - x) ? i : best), 0);
  const at = typeof chart.axis[k] === "string" ? chart.axis[k] : `${chart.key} ${format(chart.axis[k])}`;
  tip(event, [at, ...data.models.map((model, m) => `${model.name}: ${format(chart.series[m][k])} ${unit()}`)].join("\n"));
}

function tip(event, text) {
  const node = $("tip");
  node.style.opacity = text ? 1 : 0;
  if (!text) return;
  node.textContent = text;
  const x = Math.min(event.clientX + 14, window.innerWidth - node.offsetWidth - 8);
  node.style.transform = `translate(${x}px, ${event.clientY + 16}px)`;
}

build();
