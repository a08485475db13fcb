// The map: every image a dot at its place, and as many pictures as fit with little overlap.

const SMALLEST_PICTURE = Math.max(26, Math.min(0.9 * Math.sqrt(560000 / count), 56));  // CSS pixels, on the whole map
const LARGEST_PICTURE = Math.max(SMALLEST_PICTURE, Math.min(112, 1.5 * side));
const FIRST_SCALE = 300;  // CSS pixels of the map's side at level 0; each level is larger by the square root of 2
const LEVELS = 30;
const SLOT = Math.min(side, 64);  // pixels of a picture in the renderers' store
const STORE = 4096;  // pixels of the side of WebGL's store
const PICTURES_KEPT = Math.floor(STORE / SLOT) ** 2;
const OVERLAP = 0.2;  // of its side, that a picture may cover of another one
const DRAW_WITH = location.hash.slice(1);  // atlas.html#webgl2 and atlas.html#plain choose a renderer
const MARGIN = 0.05;  // free space around the whole map, of its side

const sizeAt = (level) => Math.min(LARGEST_PICTURE, SMALLEST_PICTURE * 1.1 ** Math.max(0, level - 2));
const levelOf = (scale) => Math.max(0, Math.min(LEVELS - 1, 2 * Math.log2(scale / FIRST_SCALE)));

/**
 * Which images show as pictures at which level. Typical images come first, and one that shows at a level shows at all
 * later ones, so nothing flickers while the map is dragged. Levels are computed when they are needed.
 */
class PictureLevels {
  constructor() {
    this.shown = [];  // level -> rows that appear there
    this.left = Array.from({ length: count }, (_, row) => row).sort((a, b) => rows.typicality[b] - rows.typicality[a]);
    this.accepted = [];
  }

  upTo(level) {
    while (this.shown.length <= level) this.next(this.shown.length);
    return this.shown.slice(0, level + 1);
  }

  next(level) {
    const cell = (1 - OVERLAP) * sizeAt(level) / (FIRST_SCALE * 2 ** (level / 2));
    const taken = new Map();  // at most one picture per cell: they are at least a cell apart
    const at = (row) => [rows.place[2 * row] / 65535, rows.place[2 * row + 1] / 65535];
    const put = (row) => {
      const [x, y] = at(row);
      taken.set(Math.floor(x / cell) * 1048576 + Math.floor(y / cell), row);
    };
    const free = (row) => {
      const [x, y] = at(row);
      const column = Math.floor(x / cell), line = Math.floor(y / cell);
      for (let i = column - 1; i <= column + 1; i++) {
        for (let j = line - 1; j <= line + 1; j++) {
          const other = taken.get(i * 1048576 + j);
          if (other === undefined) continue;
          const [ox, oy] = at(other);
          if (Math.abs(ox - x) < cell && Math.abs(oy - y) < cell) return false;
        }
      }
      return true;
    };
    this.accepted.forEach(put);
    const last = level === LEVELS - 1;  // images at the very same place cover each other there
    const fresh = [];
    this.left = this.left.filter((row) => {
      if (!last && !free(row)) return true;
      put(row);
      fresh.push(row);
      return false;
    });
    this.shown.push(fresh);
    this.accepted.push(...fresh);
  }
}

/** Which pictures the renderers keep, by number: the longest unused is given up for a new one. */
class Slots {
  constructor(store) {
    this.store = store;  // (slot, sheet, x, y) -> nothing
    this.of = new Map();  // row -> slot, the longest unused first
    this.asked = new Set();
    this.visible = [];
  }

  /** Mark rows as in use, and fetch those that are missing; `arrived` is called when there is something new. */
  use(visible, arrived) {
    this.visible = visible;
    const missing = new Set();
    for (const row of visible) {
      const slot = this.of.get(row);
      if (slot === undefined) missing.add(Math.floor(row / perSheet));
      else { this.of.delete(row); this.of.set(row, slot); }
    }
    for (const sheet of missing) {
      if (this.asked.has(sheet)) continue;
      this.asked.add(sheet);
      sheets.want(sheet, (picture) => {
        this.asked.delete(sheet);
        for (const row of this.visible) {
          if (Math.floor(row / perSheet) === sheet && !this.of.has(row)) this.add(row, picture);
        }
        arrived();
      });
    }
  }

  add(row, picture) {
    let slot = this.of.size;
    if (slot >= PICTURES_KEPT) {
      const [oldest, free] = this.of.entries().next().value;
      this.of.delete(oldest);
      slot = free;
    }
    this.of.set(row, slot);
    const { x, y } = cellOf(row);
    this.store(slot, picture, x, y);
  }
}

function isSoftware(gl) {
  const name = gl.getExtension("WEBGL_debug_renderer_info")?.UNMASKED_RENDERER_WEBGL ?? gl.RENDERER;
  return /swiftshader|llvmpipe|software|basic render/i.test(gl.getParameter(name));
}

/** Draws with WebGL2. Throws where there is none, or where the processor would do its work: a plain canvas is faster. */
class GpuRenderer {
  constructor(canvas) {
    this.canvas = canvas;
    this.gl = DRAW_WITH === "plain" ? null : canvas.getContext("webgl2", { antialias: false });
    if (!this.gl || (DRAW_WITH !== "webgl2" && isSoftware(this.gl))) throw new Error("no fast WebGL2");
    const gl = this.gl;
    const common = `#version 300 es
      precision highp float;
      uniform vec4 frame;  // scale and offset, x and y, CSS pixels
      uniform vec4 screen;  // width, height, size of a dot or picture in CSS pixels, device pixels per CSS pixel
      vec4 at(vec2 point) { return vec4(point / screen.xy * vec2(2, -2) + vec2(-1, 1), 0, 1); }`;
    this.dots = this.program(`${common}
      in vec2 place; in vec4 shade; out vec4 colour;
      void main() {
        gl_Position = at(place * frame.xy + frame.zw);
        gl_PointSize = screen.z * screen.w;
        colour = shade;
      }`, `#version 300 es
      precision highp float;
      in vec4 colour; out vec4 pixel;
      void main() {
        float inside = 1.0 - smoothstep(0.35, 0.5, distance(gl_PointCoord, vec2(0.5)));
        pixel = vec4(colour.rgb, 1) * colour.a * inside;
      }`);
    this.pictures = this.program(`${common}
      in vec2 place; in vec2 slot; in vec4 shade; out vec4 colour; out vec2 corner; out vec2 texel;
      void main() {
        corner = vec2(gl_VertexID & 1, gl_VertexID >> 1);
        texel = (slot + 0.5 + corner * ${(SLOT - 1).toFixed(1)}) / ${STORE.toFixed(1)};
        gl_Position = at(place + (corner - 0.5) * screen.z);
        colour = shade;
      }`, `#version 300 es
      precision highp float;
      uniform sampler2D store; uniform vec4 screen;
      in vec4 colour; in vec2 corner; in vec2 texel; out vec4 pixel;
      void main() {
        vec2 edge = min(corner, 1.0 - corner) * screen.z;
        float border = step(min(edge.x, edge.y), screen.z < 40.0 ? 1.0 : 2.0);
        pixel = vec4(mix(texture(store, texel).rgb, colour.rgb, border), 1) * colour.a;
      }`);
    this.placeBuffer = this.buffer(rows.place, gl.STATIC_DRAW);
    this.shadeBuffer = gl.createBuffer();
    this.instanceBuffer = gl.createBuffer();
    this.texture = gl.createTexture();
    gl.bindTexture(gl.TEXTURE_2D, this.texture);
    gl.texStorage2D(gl.TEXTURE_2D, 1, gl.RGBA8, STORE, STORE);
    gl.texParameteri(gl.TEXTURE_2D, gl.TEXTURE_MIN_FILTER, gl.LINEAR);
    gl.enable(gl.BLEND);
    gl.blendFunc(gl.ONE, gl.ONE_MINUS_SRC_ALPHA);
    const small = element("canvas", { width: SLOT, height: SLOT }).getContext("2d", { willReadFrequently: true });
    this.slots = new Slots((slot, picture, x, y) => {
      small.drawImage(picture, x, y, side, side, 0, 0, SLOT, SLOT);
      const pixels = small.getImageData(0, 0, SLOT, SLOT);
      gl.texSubImage2D(gl.TEXTURE_2D, 0, ...this.origin(slot), SLOT, SLOT, gl.RGBA, gl.UNSIGNED_BYTE, pixels.data);
    });
  }

  /** Where a picture lies in the texture. */
  origin(slot) {
    const perLine = Math.floor(STORE / SLOT);
    return [(slot % perLine) * SLOT, Math.floor(slot / perLine) * SLOT];
  }

  program(vertex, fragment) {
    const gl = this.gl, program = gl.createProgram();
    for (const [kind, source] of [[gl.VERTEX_SHADER, vertex], [gl.FRAGMENT_SHADER, fragment]]) {
      const shader = gl.createShader(kind);
      gl.shaderSource(shader, source);
      gl.compileShader(shader);
      gl.attachShader(program, shader);
    }
    gl.linkProgram(program);
    if (!gl.getProgramParameter(program, gl.LINK_STATUS)) throw new Error(gl.getProgramInfoLog(program) || "WebGL2");
    return program;
  }

  buffer(data, use) {
    const gl = this.gl, buffer = gl.createBuffer();
    gl.bindBuffer(gl.ARRAY_BUFFER, buffer);
    gl.bufferData(gl.ARRAY_BUFFER, data, use);
    return buffer;
  }

  attribute(program, name, buffer, size, type, normalised, stride, offset, divisor) {
    const gl = this.gl, location = gl.getAttribLocation(program, name);
    gl.bindBuffer(gl.ARRAY_BUFFER, buffer);
    gl.enableVertexAttribArray(location);
    gl.vertexAttribPointer(location, size, type, normalised, stride, offset);
    gl.vertexAttribDivisor(location, divisor);
  }

  /** Colours of the dots: (n, 4) bytes. */
  shade(shades) {
    const gl = this.gl;
    this.shades = shades;
    gl.bindBuffer(gl.ARRAY_BUFFER, this.shadeBuffer);
    gl.bufferData(gl.ARRAY_BUFFER, shades, gl.DYNAMIC_DRAW);
  }

  draw(view, visible, size, dotSize) {
    const gl = this.gl;
    gl.viewport(0, 0, this.canvas.width, this.canvas.height);
    gl.clearColor(0, 0, 0, 0);
    gl.clear(gl.COLOR_BUFFER_BIT);
    gl.useProgram(this.dots);
    this.attribute(this.dots, "place", this.placeBuffer, 2, gl.UNSIGNED_SHORT, true, 0, 0, 0);
    this.attribute(this.dots, "shade", this.shadeBuffer, 4, gl.UNSIGNED_BYTE, true, 0, 0, 0);
    this.uniforms(this.dots, view, dotSize);
    gl.drawArrays(gl.POINTS, 0, count);

    const there = visible.filter((row) => this.slots.of.has(row));
    const floats = new Float32Array(5 * there.length), bytes = new Uint8Array(floats.buffer);
    there.forEach((row, i) => {
      floats[5 * i] = view.left(row);
      floats[5 * i + 1] = view.top(row);
      floats.set(this.origin(this.slots.of.get(row)), 5 * i + 2);
      bytes.set(this.shades.subarray(4 * row, 4 * row + 4), 20 * i + 16);
    });
    gl.bindBuffer(gl.ARRAY_BUFFER, this.instanceBuffer);
    gl.bufferData(gl.ARRAY_BUFFER, floats, gl.DYNAMIC_DRAW);
    gl.useProgram(this.pictures);
    this.attribute(this.pictures, "place", this.instanceBuffer, 2, gl.FLOAT, false, 20, 0, 1);
    this.attribute(this.pictures, "slot", this.instanceBuffer, 2, gl.FLOAT, false, 20, 8, 1);
    this.attribute(this.pictures, "shade", this.instanceBuffer, 4, gl.UNSIGNED_BYTE, true, 20, 16, 1);
    this.uniforms(this.pictures, view, size);
    gl.drawArraysInstanced(gl.TRIANGLE_STRIP, 0, 4, there.length);
  }

  uniforms(program, view, size) {
    const gl = this.gl;
    gl.uniform4f(gl.getUniformLocation(program, "frame"), view.scale * view.stretch, view.scale, view.x, view.y);
    gl.uniform4f(gl.getUniformLocation(program, "screen"), view.width, view.height, size, view.ratio);
  }
}

/** Draws the same with a plain canvas. */
class PlainRenderer {
  constructor(canvas) {
    this.canvas = canvas;
    this.context = canvas.getContext("2d");
    this.pages = [];  // canvases of 8 x 8 pictures: a browser copies a whole canvas when a picture in it has changed
    this.slots = new Slots((slot, picture, x, y) => {
      const page = this.pages[slot >> 6] ??= element("canvas", { width: 8 * SLOT, height: 8 * SLOT });
      const [slotX, slotY] = this.origin(slot);
      page.getContext("2d", { willReadFrequently: true }).drawImage(picture, x, y, side, side, slotX, slotY, SLOT, SLOT);
    });
  }

  origin(slot) { return [(slot & 7) * SLOT, ((slot >> 3) & 7) * SLOT]; }

  shade(shades) {
    this.shades = shades;
    this.words = new Uint32Array(shades.buffer);
  }

  draw(view, visible, size, dotSize) {
    this.drawDots(view, dotSize);
    const { context } = this, border = size < 40 ? 1 : 2;
    context.setTransform(view.ratio, 0, 0, view.ratio, 0, 0);
    context.lineWidth = border;
    for (const row of visible) {
      const slot = this.slots.of.get(row);
      if (slot === undefined) continue;
      const left = view.left(row) - size / 2, top = view.top(row) - size / 2, shade = 4 * row;
      const [slotX, slotY] = this.origin(slot);
      context.globalAlpha = this.shades[shade + 3] / 255;
      context.drawImage(this.pages[slot >> 6], slotX, slotY, SLOT, SLOT, left, top, size, size);
      context.strokeStyle = `rgb(${this.shades[shade]} ${this.shades[shade + 1]} ${this.shades[shade + 2]})`;
      context.strokeRect(left + border / 2, top + border / 2, size - border, size - border);
    }
    context.globalAlpha = 1;
  }

  drawDots(view, dotSize) {
    const { context } = this, { width, height } = this.canvas, { ratio } = view;
    if (this.image?.width !== width || this.image.height !== height) this.image = context.createImageData(width, height);
    const pixels = new Uint32Array(this.image.data.buffer).fill(0);
    const dot = Math.max(1, Math.round(0.8 * dotSize * ratio));
    for (let row = 0; row < count; row++) {
      const left = Math.round(view.left(row) * ratio - dot / 2), top = Math.round(view.top(row) * ratio - dot / 2);
      if (left < 0 || top < 0 || left + dot > width || top + dot > height) continue;
      const word = this.words[row];
      for (let y = 0, start = top * width + left; y < dot; y++, start += width) {
        for (let x = 0; x < dot; x++) pixels[start + x] = word;  // faster than fill() for so few
      }
    }
    context.putImageData(this.image, 0, 0);
  }
}

/** Left, right, top and bottom of images on the map, leaving out a share of them at each side. */
function extent(list, share) {
  return [0, 1].flatMap((axis) => {
    const sorted = Float64Array.from(list, (row) => rows.place[2 * row + axis] / 65535).sort();
    return [share, 1 - share].map((part) => sorted[Math.round(part * (sorted.length - 1))]);
  });
}

/** The map and what a person does on it. */
class ImageMap {
  /**
   * @param {HTMLElement} box to fill
   * @param {object} on `pick(row, event)`, `lasso(rows, event)`, `labels(level) -> [{ row, text, named }]`
   */
  constructor(box, on) {
    Object.assign(this, { box, on, lassoing: false, pending: false, points: new Map(), path: null });
    this.levels = new PictureLevels();
    this.canvas = element("canvas", { class: "pictures", "aria-hidden": "true" });
    this.overlay = element("canvas", { class: "overlay", tabindex: "0", role: "application",
      "aria-label": "Map of the images: arrow keys move it, plus and minus zoom, 0 shows all. The wall shows the same images as a list." });
    box.append(this.canvas, this.overlay);
    try {
      this.renderer = new GpuRenderer(this.canvas);
      this.canvas.addEventListener("webglcontextlost", () => this.usePlainCanvas());
    } catch {
      this.canvas.getContext("webgl2")?.getExtension("WEBGL_lose_context")?.loseContext();
      this.usePlainCanvas();
    }
    new ResizeObserver(() => this.resize()).observe(box);
    this.listen();
  }

  usePlainCanvas() {
    const canvas = element("canvas", { class: "pictures", "aria-hidden": "true" });
    this.canvas.replaceWith(canvas);  // a canvas that has had WebGL gives no other context
    this.canvas = canvas;
    this.renderer = new PlainRenderer(canvas);
    if (this.shades) this.renderer.shade(this.shades);
    if (this.width) this.resize();
  }

  resize() {
    const { width, height } = this.box.getBoundingClientRect();
    if (!width || !height) return;
    const first = !this.width;
    if (!first) {
      this.x += (width - this.width) / 2;
      this.y += (height - this.height) / 2;
    }
    Object.assign(this, { width, height, ratio: Math.min(2, window.devicePixelRatio || 1) });
    for (const canvas of [this.canvas, this.overlay]) {
      canvas.width = Math.round(width * this.ratio);
      canvas.height = Math.round(height * this.ratio);
    }
    if (first) this.fit();
    else this.paint();
  }

  /** Show all. The directions of the map mean nothing, so a wide box may stretch it. */
  fit() {
    const [left, right, top, bottom] = extent(whole, 0);
    const across = Math.max(right - left, 1e-3), down = Math.max(bottom - top, 1e-3);
    const free = 1 - 2 * MARGIN;
    this.stretch = Math.max(1 / 1.6, Math.min(this.width / across / (this.height / down), 1.6));
    this.scale = this.whole = Math.min(free * this.width / (across * this.stretch), free * this.height / down);
    this.centre(left, right, top, bottom);
  }

  /** Show images in the middle, so large that most of them fit. */
  fitTo(chosen) {
    if (!this.width || !chosen.length) return;
    const [left, right, top, bottom] = extent(chosen, 0.03);
    const most = Math.max((right - left) * this.stretch / this.width, (bottom - top) / this.height, 1e-4);
    this.scale = Math.max(this.whole, Math.min(0.7 / most, this.largest()));
    this.centre(left, right, top, bottom);
  }

  centre(left, right, top, bottom) {
    this.x = this.width / 2 - this.scale * this.stretch * (left + right) / 2;
    this.y = this.height / 2 - this.scale * (top + bottom) / 2;
    this.paint();
  }

  largest() { return FIRST_SCALE * 2 ** ((LEVELS - 1) / 2); }

  zoom(factor, x = this.width / 2, y = this.height / 2) {
    const scale = Math.max(0.5 * this.whole, Math.min(this.scale * factor, this.largest()));
    this.x = x - (x - this.x) * scale / this.scale;
    this.y = y - (y - this.y) * scale / this.scale;
    this.scale = scale;
    this.paint();
  }

  move(x, y) {
    this.x += x;
    this.y += y;
    this.paint();
  }

  left(row) { return rows.place[2 * row] / 65535 * this.scale * this.stretch + this.x; }

  top(row) { return rows.place[2 * row + 1] / 65535 * this.scale + this.y; }

  /** Colours of all images: (n, 4) bytes. */
  shade(shades) {
    this.shades = shades;
    this.renderer.shade(shades);
    this.paint();
  }

  paint() {
    if (this.pending || !this.width) return;
    this.pending = true;
    requestAnimationFrame(() => {
      this.pending = false;
      if (this.box.offsetParent) this.draw();
    });
  }

  draw() {
    const level = levelOf(this.scale);
    this.size = sizeAt(level);
    const margin = this.size / 2;
    this.visible = [];
    for (const shown of this.levels.upTo(Math.floor(level))) {
      for (const row of shown) {
        const x = this.left(row), y = this.top(row);
        if (x > -margin && y > -margin && x < this.width + margin && y < this.height + margin) this.visible.push(row);
      }
    }
    this.renderer.slots.use(this.visible, () => this.paint());
    this.renderer.draw(this, this.visible, this.size, this.dotSize());
    this.drawOverlay();
  }

  dotSize() { return Math.max(2.5, Math.min(9, 2.5 * Math.sqrt(this.scale / this.whole) * (count < 3000 ? 1.5 : 1))); }

  drawOverlay() {
    const context = this.overlay.getContext("2d"), style = getComputedStyle(document.documentElement);
    const colour = (name) => style.getPropertyValue(name).trim();
    context.setTransform(this.ratio, 0, 0, this.ratio, 0, 0);
    context.clearRect(0, 0, this.width, this.height);
    const { current } = this.on.marked();
    if (current >= 0) {
      const shown = (this.visible.includes(current) ? this.size : this.dotSize() + 4) + 2;
      context.strokeStyle = colour("--accent");
      context.lineWidth = 3;
      context.strokeRect(this.left(current) - shown / 2, this.top(current) - shown / 2, shown, shown);
    }
    this.drawLabels(context, colour);
    if (this.path?.length > 1) {
      context.beginPath();
      this.path.forEach(([x, y], i) => (i ? context.lineTo(x, y) : context.moveTo(x, y)));
      context.closePath();
      context.strokeStyle = colour("--accent");
      context.lineWidth = 2;
      context.setLineDash([6, 4]);
      context.stroke();
      context.setLineDash([]);
      context.globalAlpha = 0.12;
      context.fillStyle = colour("--accent");
      context.fill();
      context.globalAlpha = 1;
    }
  }

  drawLabels(context, colour) {
    const taken = [];
    for (const { row, text, named } of this.on.labels(this.scale / this.whole)) {
      const x = this.left(row), y = this.top(row);
      if (x < 0 || y < 0 || x > this.width || y > this.height) continue;
      context.font = `${named ? 600 : 400} ${named ? 15 : 12}px system-ui, sans-serif`;
      const shown = text.length > 28 ? `${text.slice(0, 27)}…` : text;
      const width = context.measureText(shown).width + 12, height = named ? 24 : 20;
      const box = { left: x - width / 2, top: y - height / 2, right: x + width / 2, bottom: y + height / 2 };
      const apart = (other) => box.left > other.right + 4 || box.right < other.left - 4
        || box.top > other.bottom + 2 || box.bottom < other.top - 2;
      if (!taken.every(apart)) continue;
      taken.push(box);
      context.globalAlpha = named ? 0.92 : 0.78;
      context.fillStyle = colour("--raised");
      context.beginPath();
      context.roundRect(box.left, box.top, width, height, height / 2);
      context.fill();
      context.globalAlpha = 1;
      context.fillStyle = colour(named ? "--ink" : "--soft");
      context.textBaseline = "middle";
      context.textAlign = "center";
      context.fillText(shown, x, y + 1);
    }
  }

  /** The image at a point of the box, -1 where there is none. */
  at(x, y) {
    for (let i = this.visible.length - 1; i >= 0; i--) {
      const row = this.visible[i];
      if (Math.abs(this.left(row) - x) < this.size / 2 && Math.abs(this.top(row) - y) < this.size / 2) return row;
    }
    let nearest = -1, least = 9;
    for (let row = 0; row < count; row++) {
      const distance = Math.hypot(this.left(row) - x, this.top(row) - y);
      if (distance < least) [nearest, least] = [row, distance];
    }
    return nearest;
  }

  /** The images within a polygon. */
  within(polygon) {
    const inside = [];
    for (let row = 0; row < count; row++) {
      const x = this.left(row), y = this.top(row);
      let odd = false;
      for (let i = 0, j = polygon.length - 1; i < polygon.length; j = i++) {
        const [ax, ay] = polygon[i], [bx, by] = polygon[j];
        if (ay > y !== by > y && x < (bx - ax) * (y - ay) / (by - ay) + ax) odd = !odd;
      }
      if (odd) inside.push(row);
    }
    return inside;
  }

  listen() {
    const point = (event) => {
      const box = this.overlay.getBoundingClientRect();
      return [event.clientX - box.left, event.clientY - box.top];
    };
    this.overlay.addEventListener("pointerdown", (event) => {
      this.overlay.setPointerCapture(event.pointerId);
      this.points.set(event.pointerId, point(event));
      this.moved = false;
      if (this.points.size === 1 && (event.shiftKey || this.lassoing)) this.path = [point(event)];
      else this.path = null;
    });
    this.overlay.addEventListener("pointermove", (event) => {
      const before = this.points.get(event.pointerId);
      if (!before) return;
      const [x, y] = point(event);
      if (!this.moved && Math.hypot(x - before[0], y - before[1]) < 4) return;
      this.moved = true;
      this.points.set(event.pointerId, [x, y]);
      if (this.path) {
        this.path.push([x, y]);
        this.paint();
      } else if (this.points.size === 1) {
        this.move(x - before[0], y - before[1]);
      } else {
        const [other] = [...this.points].filter(([id]) => id !== event.pointerId).map(([, place]) => place);
        const span = (a) => Math.hypot(a[0] - other[0], a[1] - other[1]);
        this.zoom(span([x, y]) / Math.max(1, span(before)), (x + other[0]) / 2, (y + other[1]) / 2);
        this.move((x - before[0]) / 2, (y - before[1]) / 2);
      }
    });
    const end = (event) => {
      if (!this.points.delete(event.pointerId)) return;
      const path = this.path;
      this.path = null;
      if (event.type === "pointercancel") return this.paint();
      if (path && path.length > 2) this.on.lasso(this.within(path), event);
      else if (!this.moved && !this.points.size) this.on.pick(this.at(...point(event)), event);
      this.paint();
    };
    this.overlay.addEventListener("pointerup", end);
    this.overlay.addEventListener("pointercancel", end);
    this.overlay.addEventListener("wheel", (event) => {
      event.preventDefault();
      const lines = event.deltaMode === 1 ? 20 : 1;
      this.zoom(Math.exp(-event.deltaY * lines * (event.ctrlKey ? 0.01 : 0.0016)), ...point(event));
    }, { passive: false });
    this.overlay.addEventListener("dblclick", (event) => this.zoom(2, ...point(event)));
  }
}
