// The inbox: what deserves a look, by kind, with one click for a group and one for a kind.

const KINDS = {
  "exact copies": ["Exact copies", "The same pixels more than once."],
  "near copies": ["Near copies", "The same picture, mirrored, turned, cropped or saved again."],
  "unsure names": ["Unsure names", "Names from before whose cluster is no longer clear. Give them a name, or leave them without."],
  outliers: ["Odd ones", "Far from all others: mistakes, or finds."],
  blurred: ["Blurred", "Hardly any sharp edge."],
  dark: ["Dark", "Almost black."],
  bright: ["Bright", "Almost white."],
  blank: ["Blank", "One colour, or nearly."],
};
const GROUPS_AT_ONCE = 60;
const PICTURES_PER_GROUP = 12;

const isCopies = (kind) => kind.endsWith("copies");

/** Whether a person has decided about a group: about all of its images; of copies one may be left open, the one to keep. */
function isDecided(group, stateOf) {
  return group.rows.filter((row) => !stateOf(row)).length <= (isCopies(group.kind) ? 1 : 0);
}

/** What to drop so that one image of each group of copies stays, the first where possible, also where groups overlap. */
function spareCopies(groups, stateOf) {
  const spare = new Set();
  const isGone = (row) => spare.has(row) || stateOf(row) === "dropped";
  for (const { rows: copies } of groups) {
    const stays = copies.find((row) => !isGone(row));
    for (const row of copies) if (row !== stays && !isGone(row)) spare.add(row);
  }
  return [...spare];
}

class Inbox {
  /**
   * @param {HTMLElement} box to fill
   * @param {object} on `pick`, `marked` as of the wall; `drop(rows, text)`, `keep(rows, text)`, `label(rows)`,
   *   `showAll(group)`
   */
  constructor(box, on) {
    Object.assign(this, { box, on, shown: new Map(), groups: new Map() });
    for (const group of content.inbox) {
      if (!this.groups.has(group.kind)) this.groups.set(group.kind, []);
      this.groups.get(group.kind).push(group);
    }
    const order = Object.keys(KINDS);
    this.kinds = [...this.groups.keys()].sort((a, b) => (order.indexOf(a) + 99) % 99 - (order.indexOf(b) + 99) % 99);
    this.build();
  }

  /** Groups without a decision. */
  open(kind) {
    const { stateOf } = this.on.marked();
    return (kind ? this.groups.get(kind) : content.inbox).filter((group) => !isDecided(group, stateOf));
  }

  build() {
    this.tiles = [];
    this.cards = [];
    this.heads = new Map();
    const sections = this.kinds.map((kind) => this.section(kind));
    if (content.unreadable.length) sections.push(this.unreadable());
    const links = this.kinds.map((kind) => element("a", { href: `#kind-${kind.replace(/\W/g, "-")}` },
      KINDS[kind]?.[0] ?? kind, element("small", {}, number(this.groups.get(kind).length))));
    if (content.unreadable.length) {
      links.push(element("a", { href: "#kind-unreadable" }, "Unreadable", element("small", {}, number(content.unreadable.length))));
    }
    this.box.replaceChildren(
      sections.length ? element("nav", { class: "kinds", "aria-label": "Kinds" }, links)
        : element("p", { class: "empty" }, "Nothing here: no copies, no odd, dark, blurred or unreadable images were found."),
      ...sections);
    this.mark();
  }

  section(kind) {
    const groups = this.groups.get(kind), [title, sentence] = KINDS[kind] ?? [kind, ""];
    const limit = this.shown.get(kind) ?? GROUPS_AT_ONCE;
    const buttons = isCopies(kind)
      ? [this.button("Keep the first of each, drop the others", () => this.decideAll(kind, "drop"), "warn"),
        this.button("Keep all", () => this.decideAll(kind, "keep"))]
      : [this.button("Drop all", () => this.decideAll(kind, "drop"), "warn"),
        this.button("Keep all", () => this.decideAll(kind, "keep"))];
    const open = element("span", { class: "open" });
    const head = element("header", {}, element("div", {}, element("h2", {}, title, " ", open), element("p", {}, sentence)),
      element("div", { class: "buttons" }, buttons));
    this.heads.set(kind, { open, buttons });
    const single = !isCopies(kind) && groups.every((group) => group.rows.length === 1);
    return element("section", { id: `kind-${kind.replace(/\W/g, "-")}`, class: `kind${single ? " single" : ""}` }, head,
      element("div", { class: "cards" }, groups.slice(0, limit).map((group) => this.card(group))),
      groups.length > limit && this.button(`Show ${number(Math.min(GROUPS_AT_ONCE * 4, groups.length - limit))} more of ${number(groups.length)}`, () => {
        this.shown.set(kind, limit + GROUPS_AT_ONCE * 4);
        this.build();
      }));
  }

  card(group) {
    const pictures = group.rows.slice(0, PICTURES_PER_GROUP).map((row, i) => {
      const tile = imageTile(row, this.on);
      tile.removeAttribute("id");
      tile.setAttribute("role", "button");
      tile.tabIndex = 0;
      tile.addEventListener("keydown", (event) => event.key === "Enter" && this.on.pick(row, event));
      this.tiles.push([row, tile]);
      return element("figure", { class: isCopies(group.kind) && i === 0 ? "first" : "" }, tile,
        element("figcaption", {}, content.keys[row].split("/").pop()));
    });
    const many = group.rows.length - pictures.length;
    const names = plural(group.rows.length, "image");
    const buttons = isCopies(group.kind)
      ? [this.button("Keep the first, drop the others", () => this.on.drop(spareCopies([group], this.on.marked().stateOf), "the copies"), "warn"),
        this.button("Keep all", () => this.on.keep(group.rows, names))]
      : [this.button("Drop", () => this.on.drop(group.rows, names), "warn"), this.button("Keep", () => this.on.keep(group.rows, names)),
        group.kind === "unsure names" && this.button("Name", () => this.on.label(group.rows))];
    const card = element("article", { class: "card" }, element("div", { class: "strip" }, pictures,
      many > 0 && this.button(`and ${number(many)} more`, () => this.on.showAll(group))),
    element("p", { class: "why" }, group.why), element("div", { class: "buttons" }, buttons));
    this.cards.push([group, card]);
    return card;
  }

  button(text, onclick, kind = "") { return element("button", { type: "button", class: kind, onclick }, text); }

  decideAll(kind, action) {
    const open = this.open(kind), groups = plural(open.length, "group");
    if (!open.length) return;
    if (action === "keep") this.on.keep(open.flatMap((group) => group.rows), groups);
    else if (isCopies(kind)) this.on.drop(spareCopies(open, this.on.marked().stateOf), `the copies of ${groups}`);
    else this.on.drop(open.flatMap((group) => group.rows), groups);
  }

  unreadable() {
    const { length } = content.unreadable;
    return element("section", { class: "kind", id: "kind-unreadable" },
      element("header", {}, element("div", {}, element("h2", {}, "Unreadable", " ", element("span", { class: "open" }, number(length))),
        element("p", {}, "These files were left out. They are untouched."))),
      element("table", {}, element("tbody", {}, content.unreadable.slice(0, 2000).map(([key, reason]) =>
        element("tr", {}, element("th", { scope: "row" }, key), element("td", {}, reason))))),
      length > 2000 && element("p", {}, `and ${number(length - 2000)} more, in unreadable.txt`));
  }

  /** Show decisions. */
  mark() {
    const marked = this.on.marked();
    for (const [row, tile] of this.tiles) markTile(tile, row, marked);
    for (const [group, card] of this.cards) card.classList.toggle("decided", isDecided(group, marked.stateOf));
    for (const [kind, { open, buttons }] of this.heads) {
      const left = this.open(kind).length, all = this.groups.get(kind).length;
      open.textContent = left === all ? number(all) : left ? `${number(left)} of ${number(all)} open` : `${number(all)}, all decided`;
      for (const button of buttons) button.disabled = !left;
    }
  }
}
