// The sphere, as a globe or unrolled (Mollweide), from errors on rings.
const TEX_W = 512, TEX_H = 256;

// Cubic interpolation of rows (theta) and columns (phi) into a fine texture of colour indices.
function texture(grid, map, scale) {
  const P = map.length, A = map[0].length, rad = Math.PI / 180;
  const value = map.map((row) => row.map((x) => Math.max(-0.2, Math.min(1.2, scale.of(x)))));
  const fine = value.map((row) => {
    const out = new Float32Array(TEX_W);
    for (let c = 0; c < TEX_W; c++) {
      const x = (c / TEX_W) * A, i = Math.floor(x), u = x - i;
      const at = (k) => row[(i + k + A) % A];
      out[c] = at(0) + 0.5 * u * (at(1) - at(-1) + u * (2 * at(-1) - 5 * at(0) + 4 * at(1) - at(2)
        + u * (3 * (at(0) - at(1)) + at(2) - at(-1))));
    }
    return out;
  });
  const theta = grid.axes.theta.map((x) => x * rad);
  // Beyond a pole the ring is met again half a turn further.
  const ring = (k) => {
    if (k < 0) return [-theta[-1 - k], fine[-1 - k], TEX_W / 2];
    if (k >= P) return [2 * Math.PI - theta[2 * P - 1 - k], fine[2 * P - 1 - k], TEX_W / 2];
    return [theta[k], fine[k], 0];
  };
  const out = new Uint8Array(TEX_W * TEX_H);
  for (let r = 0; r < TEX_H; r++) {
    const t = ((r + 0.5) / TEX_H) * Math.PI;
    let k = -1;
    while (k + 1 < P && theta[k + 1] <= t) k++;
    const [a, b, c, d] = [ring(k - 1), ring(k), ring(k + 1), ring(k + 2)];
    const h = c[0] - b[0], u = (t - b[0]) / h, u2 = u * u, u3 = u2 * u;
    for (let x = 0; x < TEX_W; x++) {
      const va = a[1][(x + a[2]) % TEX_W], vb = b[1][(x + b[2]) % TEX_W];
      const vc = c[1][(x + c[2]) % TEX_W], vd = d[1][(x + d[2]) % TEX_W];
      const mb = (vc - va) / (c[0] - a[0]) * h, mc = (vd - vb) / (d[0] - b[0]) * h;
      const v = (2 * u3 - 3 * u2 + 1) * vb + (u3 - 2 * u2 + u) * mb + (3 * u2 - 2 * u3) * vc + (u3 - u2) * mc;
      out[r * TEX_W + x] = Math.max(0, Math.min(255, Math.round(v * 255)));
    }
  }
  return out;
}

// Direction in the reader's frame of a point of the picture (x, y in radii), or null.
function unproject(x, y) {
  if (!state.flat) {
    const q = 1 - x * x - y * y;
    return q < 0 ? null : [x, y, Math.sqrt(q)];
  }
  if ((x * x) / 4 + y * y > 1) return null;
  const a = Math.asin(y), latitude = Math.asin(Math.max(-1, Math.min(1, (2 * a + Math.sin(2 * a)) / Math.PI)));
  const longitude = (Math.PI * x) / (2 * Math.max(Math.cos(a), 1e-9));
  if (Math.abs(longitude) > Math.PI) return null;
  const c = Math.cos(latitude);
  return [c * Math.sin(longitude), Math.sin(latitude), c * Math.cos(longitude)];
}
function project(v) {
  if (!state.flat) return v[2] > -0.02 ? [v[0], v[1]] : null;
  const latitude = Math.asin(Math.max(-1, Math.min(1, v[1]))), longitude = Math.atan2(v[0], v[2]);
  let a = latitude;
  for (let k = 0; k < 12; k++) {
    const slope = 2 + 2 * Math.cos(2 * a);
    if (slope < 1e-6) break;
    a -= (2 * a + Math.sin(2 * a) - Math.PI * Math.sin(latitude)) / slope;
  }
  return [(2 * longitude * Math.cos(a)) / Math.PI, Math.sin(a)];
}

class Sphere {
  constructor(canvas) {
    this.canvas = canvas;
    this.layer = document.createElement("canvas");
    this.key = "";
  }

  layout() {
    const width = this.canvas.clientWidth, height = Math.min(state.flat ? width / 2 + 16 : width, 372);
    const radius = state.flat ? Math.min(width / 4 - 10, height / 2 - 14) : Math.min(width, height) / 2 - 22;
    return { width, height, radius, cx: width / 2, cy: height / 2 };
  }

  // Directions of the pixels, computed again only when size or projection change.
  prepare(radius, ratio) {
    const key = `${radius} ${ratio} ${state.flat}`;
    if (key === this.key) return;
    this.key = key;
    const h = Math.ceil(radius * ratio) * 2, w = state.flat ? 2 * h : h;
    this.layer.width = w;
    this.layer.height = h;
    this.pixels = [];
    const at = [], where = [];
    for (let y = 0; y < h; y++)
      for (let x = 0; x < w; x++) {
        const v = unproject(((x + 0.5 - w / 2) / h) * 2, (-(y + 0.5 - h / 2) / h) * 2);
        if (v) { at.push(y * w + x); where.push(v[0], v[1], v[2]); }
      }
    this.at = Uint32Array.from(at);
    this.where = Float32Array.from(where);
    this.image = this.layer.getContext("2d").createImageData(w, h);
    this.words = new Uint32Array(this.image.data.buffer);
  }

  draw(map) {
    const ratio = Math.min(2, window.devicePixelRatio || 1), { width, height, radius, cx, cy } = this.layout();
    const context = fit(this.canvas, width, height);
    this.prepare(radius, ratio);
    const [[a, b, c], [d, e, f], [g, h, i]] = state.view, n = this.at.length, w = this.where;
    for (let k = 0; k < n; k++) {
      const X = w[3 * k], Y = w[3 * k + 1], Z = w[3 * k + 2];
      const x = a * X + d * Y + g * Z, y = b * X + e * Y + h * Z, z = c * X + f * Y + i * Z;
      const row = Math.min(TEX_H - 1, (Math.acos(Math.max(-1, Math.min(1, z))) / Math.PI) * TEX_H | 0);
      const column = ((Math.atan2(y, x) / (2 * Math.PI) + 1) * TEX_W | 0) % TEX_W;
      this.words[this.at[k]] = PALETTE[map[row * TEX_W + column]];
    }
    this.layer.getContext("2d").putImageData(this.image, 0, 0);
    const half = state.flat ? 2 * radius : radius;
    context.save();
    context.beginPath();
    context.ellipse(cx, cy, half - 0.5, radius - 0.5, 0, 0, 2 * Math.PI);
    context.clip();
    context.drawImage(this.layer, cx - half, cy - radius, 2 * half, 2 * radius);
    this.graticule(context, cx, cy, radius);
    if (!state.flat) { // a faint edge makes the disc a ball and leaves its colours alone
      const shade = context.createRadialGradient(cx, cy, radius * 0.86, cx, cy, radius);
      shade.addColorStop(0, "rgba(0,0,0,0)");
      shade.addColorStop(1, "rgba(0,0,0,0.20)");
      context.fillStyle = shade;
      context.fillRect(cx - radius, cy - radius, 2 * radius, 2 * radius);
    }
    context.restore();
    context.beginPath();
    context.ellipse(cx, cy, half, radius, 0, 0, 2 * Math.PI);
    context.lineWidth = 1;
    context.strokeStyle = ink("--quiet");
    context.stroke();
    this.marks(context, cx, cy, radius);
  }

  graticule(context, cx, cy, radius) {
    const line = (points) => {
      context.beginPath();
      let last = null;
      for (const v of points) {
        const p = project(apply(state.view, v));
        const jump = !p || !last || Math.hypot(p[0] - last[0], p[1] - last[1]) > 0.5;
        if (p) context[jump ? "moveTo" : "lineTo"](cx + p[0] * radius, cy - p[1] * radius);
        last = p;
      }
      context.stroke();
    };
    const circle = (make) => Array.from({ length: 73 }, (_, k) => make((k * Math.PI) / 36));
    context.lineWidth = 0.7;
    context.strokeStyle = "rgba(255,255,255,0.20)";
    for (let t = 30; t < 180; t += 30) {
      const s = Math.sin((t * Math.PI) / 180), z = Math.cos((t * Math.PI) / 180);
      line(circle((x) => [s * Math.cos(x), s * Math.sin(x), z]));
    }
    for (let p = 0; p < 180; p += 30) {
      const x = Math.cos((p * Math.PI) / 180), y = Math.sin((p * Math.PI) / 180);
      line(circle((t) => [x * Math.sin(t), y * Math.sin(t), Math.cos(t)]));
    }
  }

  marks(context, cx, cy, radius) {
    context.font = `600 13px ${FONT}`;
    context.textAlign = "center";
    context.textBaseline = "middle";
    ["x", "y", "z"].forEach((name, k) => {
      for (const sign of [1, -1]) {
        const v = [0, 1, 2].map((m) => (m === k ? sign : 0)), p = project(apply(state.view, v));
        if (!p) continue;
        const x = cx + p[0] * radius, y = cy - p[1] * radius;
        context.beginPath();
        context.arc(x, y, 3, 0, 2 * Math.PI);
        context.fillStyle = "#fff";
        context.fill();
        context.lineWidth = 1;
        context.strokeStyle = "rgba(0,0,0,0.55)";
        context.stroke();
        const away = Math.hypot(p[0], p[1]), far = state.flat || away < 0.85 ? null : (1 + 12 / radius) / away;
        const [lx, ly] = far ? [cx + p[0] * radius * far, cy - p[1] * radius * far] : [x + 11, y - 9];
        const text = (sign < 0 ? "−" : "") + name;
        if (!far) {
          context.lineWidth = 3;
          context.strokeStyle = "rgba(0,0,0,0.5)";
          context.strokeText(text, lx, ly);
        }
        context.fillStyle = far ? ink("--ink") : "#fff";
        context.fillText(text, lx, ly);
      }
    });
    if (state.pick) {
      const p = project(apply(state.view, state.pick));
      if (p)
        for (const [size, colour] of [[4, "#000"], [2, "#fff"]]) {
          context.beginPath();
          context.arc(cx + p[0] * radius, cy - p[1] * radius, 8, 0, 2 * Math.PI);
          context.lineWidth = size;
          context.strokeStyle = colour;
          context.stroke();
        }
    }
  }

  // Direction under the pointer, in the frame of the laboratory, or null.
  direction(event) {
    const box = this.canvas.getBoundingClientRect(), { radius, cx, cy } = this.layout();
    const v = unproject((event.clientX - box.left - cx) / radius, -(event.clientY - box.top - cy) / radius);
    return v && apply(transpose(state.view), v);
  }
}
const PALETTE = Uint32Array.from(colours, ([r, g, b]) => (255 << 24) | (b << 16) | (g << 8) | r);
