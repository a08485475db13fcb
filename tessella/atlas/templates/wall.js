// The wall: the images of what is chosen as a grid of which only the part on the screen exists.

const ORDERS = {
  typical: { label: "Typical first", of: (row) => -rows.typicality[row] },
  borderline: { label: "Borderline first", of: (row) => rows.margin[row] },
  odd: { label: "Odd first", of: (row) => -rows.outlier[row] },
};
const TILE = side >= 96 ? 104 : side >= 64 ? 84 : 68;  // CSS pixels with the gap

/** Rows in the order of a measure; images without one stay as they come. */
function ordered(list, order) {
  const of = ORDERS[order].of;
  return content.clusters.length ? Array.from(list).sort((a, b) => of(a) - of(b) || a - b) : Array.from(list);
}

class Wall {
  /**
   * @param {HTMLElement} box that scrolls
   * @param {object} on `pick(row, event)`, `marked() -> { current, selected, stateOf, labelOf }`
   */
  constructor(box, on) {
    Object.assign(this, { box, on, rows: [], tiles: new Map() });
    this.inner = element("div", { class: "tiles", role: "presentation" });
    box.append(this.inner);
    box.addEventListener("scroll", () => this.paint(), { passive: true });
    new ResizeObserver(() => this.layout()).observe(box);
  }

  show(list) {
    this.rows = list;
    this.position = new Map();
    list.forEach((row, i) => this.position.set(row, i));
    this.box.scrollTop = 0;
    this.clear();
    this.layout();
  }

  clear() {
    for (const tile of this.tiles.values()) tile.remove();
    this.tiles.clear();
  }

  layout() {
    const width = this.inner.clientWidth;
    if (!width) return;
    this.columns = Math.max(1, Math.floor(width / TILE));
    this.tile = Math.floor(width / this.columns);
    this.inner.style.height = `${Math.ceil(this.rows.length / this.columns) * this.tile}px`;
    for (const [row, tile] of this.tiles) this.put(row, tile);
    this.paint();
  }

  put(row, tile) {
    const i = this.position.get(row);
    tile.style.width = tile.style.height = `${this.tile}px`;
    tile.style.transform = `translate(${(i % this.columns) * this.tile}px, ${Math.floor(i / this.columns) * this.tile}px)`;
  }

  paint() {
    if (!this.columns || !this.box.offsetParent) return;
    const first = Math.max(0, Math.floor(this.box.scrollTop / this.tile) - 2) * this.columns;
    const last = Math.ceil((this.box.scrollTop + this.box.clientHeight) / this.tile + 2) * this.columns;
    const wanted = new Set(this.rows.slice(first, last));
    for (const [row, tile] of this.tiles) {
      if (wanted.has(row)) continue;
      tile.remove();
      this.tiles.delete(row);
    }
    for (const row of wanted) {
      if (this.tiles.has(row)) continue;
      const tile = imageTile(row, this.on);
      this.tiles.set(row, tile);
      this.put(row, tile);
      this.inner.append(tile);
    }
    this.mark();
  }

  /** Show which images are current, selected, kept and dropped. */
  mark() {
    for (const [row, tile] of this.tiles) markTile(tile, row, this.on.marked());
    const { current } = this.on.marked();
    if (this.tiles.has(current)) this.box.setAttribute("aria-activedescendant", `tile-${current}`);
    else this.box.removeAttribute("aria-activedescendant");
  }

  /** The row some steps from another one: `across` and `down` are -1, 0 or 1. */
  neighbour(row, across, down) {
    const at = this.position.get(row);
    if (at === undefined) return this.rows[0] ?? -1;
    const next = at + across + down * this.columns;
    return this.rows[next] ?? row;
  }

  scrollTo(row) {
    const at = this.position.get(row);
    if (at === undefined || !this.columns) return;
    const top = Math.floor(at / this.columns) * this.tile;
    if (top < this.box.scrollTop) this.box.scrollTop = top;
    else if (top + this.tile > this.box.scrollTop + this.box.clientHeight) {
      this.box.scrollTop = top + this.tile - this.box.clientHeight;
    }
  }
}

/** An image in a grid. */
function imageTile(row, on) {
  const tile = element("div", { class: "tile", role: "option", id: `tile-${row}`, onclick: (event) => on.pick(row, event) },
    thumbnail(row));
  tile.title = printable(content.keys[row]);
  return tile;
}

function markTile(tile, row, { current, selected, stateOf }) {
  const state = stateOf(row);
  tile.classList.toggle("current", row === current);
  tile.classList.toggle("dropped", state === "dropped");
  tile.classList.toggle("kept", state === "kept");
  tile.setAttribute("aria-selected", selected.has(row) || row === current);
  tile.classList.toggle("selected", selected.has(row));
  tile.setAttribute("aria-label", printable(content.keys[row]) + (state ? `, ${state}` : ""));
}
