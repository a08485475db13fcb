// The content of the page: numbers, names, and pictures that are decoded when they are needed.

const ARRAYS = {
  i1: Int8Array, u1: Uint8Array, i2: Int16Array, u2: Uint16Array, i4: Int32Array, f4: Float32Array, i8: BigInt64Array,
};
const DECODED_SHEETS = 16;  // kept, of at most 2.4 MB each
const LOADED_SCRIPTS = 6;  // kept, of about 1.5 MB each

const content = JSON.parse(document.getElementById("content").textContent);
document.getElementById("content").remove();  // tens of megabytes
const count = content.count;
const rows = unpackAll(content.arrays);
const ids = Array.from(rows.ids, String);
const clusterPaths = Array.from(rows.fine, (index) => (index < 0 ? "" : content.clusters[index].path));
const labelOf = (row) => content.labels[rows.label[row]];
const perImage = { neighbours: rows.neighbours.length / count || 0, components: rows.components.length / count || 0 };

function unpackAll(arrays) {
  const unpacked = {};
  for (const [name, packed] of Object.entries(arrays)) {
    if (packed === null) continue;
    unpacked[name] = new ARRAYS[packed.kind](bytesOfBase64(packed.data).buffer);
  }
  content.arrays = null;  // the texts are needed no more
  return unpacked;
}

function bytesOfBase64(base64) {
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(base64);
  const text = atob(base64), bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  return bytes;
}

/** Text on one line, every character that could steer the reader's eye written out; as tessella/text.py. */
function printable(text) {
  return String(text).replace(STEERING, (character) => {
    const code = character.codePointAt(0);
    const digits = code.toString(16);
    if (code < 0x100) return { 9: "\\t", 10: "\\n", 13: "\\r" }[code] || `\\x${digits.padStart(2, "0")}`;
    return code < 0x10000 ? `\\u${digits.padStart(4, "0")}` : `\\U${digits.padStart(8, "0")}`;
  });
}

const number = (value) => value.toLocaleString("en-US");
const plural = (value, one, many = `${one}s`) => `${number(value)} ${value === 1 ? one : many}`;
const percent = (share) => (share > 0 && share < 0.01 ? "under 1 %" : `${Math.floor(100 * share)} %`);

/** An element: `element("button", { class: "quiet", onclick }, "Undo")`. Children that are texts are shown printable. */
function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value !== false && value !== null && value !== undefined) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false && child !== "")
    .map((child) => (child instanceof Node ? child : printable(child))));
  return made;
}

// --- pictures ---

const { side, columns, scripts, sheetsPerScript } = content.pictures;
const perSheet = columns * columns;

/** A small least-recently-used store. */
class Recent {
  constructor(limit) { this.limit = limit; this.entries = new Map(); }
  get(key) {
    const value = this.entries.get(key);
    if (value !== undefined) { this.entries.delete(key); this.entries.set(key, value); }
    return value;
  }
  set(key, value) {
    this.entries.set(key, value);
    if (this.entries.size > this.limit) this.entries.delete(this.entries.keys().next().value);
  }
}

/** Decoded sheets of thumbnails. */
const sheets = {
  decoded: new Recent(DECODED_SHEETS),
  loaded: new Recent(LOADED_SCRIPTS),
  waiting: new Map(),  // sheet -> callbacks, the latest asked for last
  running: 0,

  /** Call `use(canvas)` with a sheet, at once if it is decoded. */
  want(sheet, use) {
    const there = this.decoded.get(sheet);
    if (there) return use(there);
    const callbacks = this.waiting.get(sheet) || [];
    this.waiting.delete(sheet);
    this.waiting.set(sheet, callbacks.concat(use));
    this.work();
  },

  async work() {
    if (this.running >= 3 || !this.waiting.size) return;
    const latest = [...this.waiting.keys()].reverse();
    const sheet = latest.find((one) => this.loaded.entries.has(blockOf(one))) ?? latest[0];
    const callbacks = this.waiting.get(sheet);
    this.waiting.delete(sheet);
    this.running++;
    try {
      const canvas = await this.decode(sheet);
      this.decoded.set(sheet, canvas);
      for (const use of callbacks) use(canvas);
    } catch (error) {
      say(`Pictures could not be loaded: ${error.message}`);
    } finally {
      this.running--;
      this.work();
    }
    this.work();
  },

  async decode(sheet) {
    const bitmap = await createImageBitmap(new Blob([bytesOfBase64(await this.text(sheet))], { type: "image/webp" }));
    const canvas = document.createElement("canvas");
    canvas.width = bitmap.width;
    canvas.height = bitmap.height;
    canvas.getContext("2d", { willReadFrequently: true }).drawImage(bitmap, 0, 0);
    bitmap.close();  // an <img> would keep its pixels for as long as the browser likes
    return canvas;
  },

  async text(sheet) {
    if (!scripts.length) return document.getElementById(`sheet-${sheet}`).textContent;
    const block = blockOf(sheet);
    if (!this.loaded.get(block)) this.loaded.set(block, loadScript(block));
    return (await this.loaded.get(block))[sheet % sheetsPerScript];
  },
};

const blockOf = (sheet) => Math.floor(sheet / sheetsPerScript);
const arriving = new Map();

/** The sheets in a script beside the page, which calls `tessellaPictures`. */
function loadScript(block) {
  return new Promise((resolve, reject) => {
    const script = document.createElement("script");
    arriving.set(block, resolve);
    script.src = scripts[block];
    script.onload = () => script.remove();
    script.onerror = () => {
      sheets.loaded.entries.delete(block);
      reject(new Error(`${scripts[block]} is missing beside the page`));
    };
    document.head.append(script);
  });
}

if (scripts.length) window.tessellaPictures = (block, texts) => arriving.get(block)?.(texts);

/** Where the thumbnail of a row lies on its sheet. */
function cellOf(row) {
  const cell = row % perSheet;
  return { sheet: Math.floor(row / perSheet), x: (cell % columns) * side, y: Math.floor(cell / columns) * side };
}

/** A canvas that shows an image as soon as its sheet is there. */
function thumbnail(row) {
  const canvas = element("canvas", { width: side, height: side, "aria-hidden": "true" });
  const { sheet, x, y } = cellOf(row);
  sheets.want(sheet, (picture) => canvas.getContext("2d").drawImage(picture, x, y, side, side, 0, 0, side, side));
  return canvas;
}
