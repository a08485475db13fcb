// The page: what is chosen, what a person decides, and the panels that show it.

const keptAs = (revision) => `tessella ${content.atlas} ${revision}`;  // in the browser's own storage
const KINDS_OF_FLAGS = ["dark", "bright", "blank", "blurred", "has copies", "odd"];
const SUGGESTIONS = 8;

const $ = (id) => document.getElementById(id);
const state = {
  events: mergedLogs(content.events, storedEvents()),
  resolved: null,  // what follows from the events
  nodes: new Map(),  // path -> cluster
  roots: [],
  open: new Set(),  // clusters whose inner ones are shown
  chosen: new Set(),  // clusters, the last chosen last
  selected: new Set(),  // images
  current: -1,  // image
  view: "wall",
  order: "typical",
  list: null,  // { title, rows } on the wall in place of clusters
  naming: null,  // { paths } or { images } while the field for a name is open
  focus: "tree",  // where keys act: "tree" or "images"
};
const whole = Int32Array.from({ length: count }, (_, row) => row);
let map = null, wall, inbox;

// --- events ---

/** What this browser has kept; also what was decided about images before there were clusters. */
function storedEvents() {
  const kept = (revision) => JSON.parse(localStorage.getItem(keptAs(revision)) || "[]").filter(isEvent);
  try {
    const early = content.revision ? liveEvents(kept("")).filter((event) => event.images) : [];
    return mergedLogs(kept(content.revision), early);
  } catch {
    return [];  // a browser may keep nothing for pages from the disk
  }
}

/** Take events into the log, keep it, and show what follows. */
function record(...events) {
  const time = new Date().toISOString().replace(/\.\d+Z$/, "Z");
  for (const event of events) state.events.push({ ...event, time });
  keepEvents();
  resolve();
}

function keepEvents() {
  try {
    localStorage.setItem(keptAs(content.revision), JSON.stringify(state.events));
  } catch {
    say("This browser cannot keep more names: save names.json before you close the page.");
  }
}

function undo() {
  const last = liveEvents(state.events).at(-1);
  if (!last) return say("There is nothing to undo.");
  record({ action: "undo" });
  say(`Taken back: ${sentenceOf(last)}`);
}

function sentenceOf(event) {
  const images = event.images && plural(event.images.length, "image");
  switch (event.action) {
    case "name": {
      const which = event.clusters.length === 1 ? `cluster ${event.clusters[0]}` : plural(event.clusters.length, "cluster");
      return event.name ? `${which} named “${event.name}”` : `the name of ${which} removed`;
    }
    case "label": return event.name ? `${images} labelled “${event.name}”` : `labels of ${images} removed`;
    case "split": return `cluster ${event.cluster} split`;
    case "drop": return `${images} dropped`;
    default: return `${images} kept`;
  }
}

/** Compute what follows from the events, and show it. */
function resolve() {
  state.resolved = resolveNames(clusterPaths, ids, state.events);
  buildTree();
  for (const path of state.chosen) if (!state.nodes.has(path)) state.chosen.delete(path);
  showAll();
}

// --- clusters ---

/** The clusters with those that splits have made. */
function buildTree() {
  state.nodes.clear();
  state.roots = [];
  for (const cluster of content.clusters) {
    addNode(cluster.path, whole.subarray(cluster.start, cluster.start + cluster.size), cluster.cohesion);
  }
  for (const split of state.resolved.splits.sort()) {  // a cluster before those that it was split into
    const whole = state.nodes.get(split);
    if (!whole || whole.inner.length) continue;  // only a cluster without inner ones is split
    for (const path of [`${split}.1`, `${split}.2`]) {
      const part = whole.rows.filter((row) => `${state.resolved.paths[row]}.`.startsWith(`${path}.`));
      if (part.length) addNode(path, part, null);
    }
  }
}

function addNode(path, list, cohesion) {
  const parent = state.nodes.get(path.slice(0, Math.max(0, path.lastIndexOf(".")))) ?? null;
  const node = { path, rows: list, cohesion, parent, inner: [], level: path.split(".").length };
  state.nodes.set(path, node);
  (parent ? parent.inner : state.roots).push(node);
}

/** The name that counts for a cluster: its own, or that of the nearest cluster around it; "" for none. */
function nameOf(path) {
  for (const above of pathsUp(path)) if (state.resolved.names.has(above)) return state.resolved.names.get(above);
  return "";
}

const titleOf = (path) => (nameOf(path) ? `${nameOf(path)} (${path})` : `cluster ${path}`);
const stepOf = (path) => (state.resolved.names.has(path) ? `${path} ${state.resolved.names.get(path)}` : path);
const isNamed = (node) => Boolean(nameOf(node.path)) || (node.inner.length > 0 && node.inner.every(isNamed));
const nodeOf = (row) => state.nodes.get(state.resolved.paths[row]);

function* nodesInOrder(nodes = state.roots, onlyOpen = false) {
  for (const node of nodes) {
    yield node;
    if (!onlyOpen || state.open.has(node.path)) yield* nodesInOrder(node.inner, onlyOpen);
  }
}

function choose(path, { add = false } = {}) {
  if (add && state.chosen.has(path)) state.chosen.delete(path);
  else {
    if (!add) state.chosen.clear();
    if (path) state.chosen.add(path);
  }
  for (let node = state.nodes.get(path)?.parent; node; node = node.parent) state.open.add(node.path);
  state.list = null;
  state.selected.clear();
  state.focus = "tree";
  if (state.naming && !add) state.naming = null;
  showChoice();
  if (map && state.view === "map" && state.chosen.size) map.fitTo(chosenRows());
}

const lastChosen = () => [...state.chosen].at(-1) ?? "";

/** The images of what is chosen: clusters, a list, or all. */
function chosenRows() {
  if (state.list) return state.list.rows;
  if (!state.chosen.size) return whole;
  const nodes = [...state.chosen].map((path) => state.nodes.get(path));
  return nodes.length === 1 ? nodes[0].rows : [...new Set(nodes.flatMap((node) => Array.from(node.rows)))];
}

// --- images ---

const stateOf = (row) => state.resolved.states[row];
const marked = () => ({ current: state.current, selected: state.selected, stateOf });

function pick(row, event = {}) {
  if (row < 0) {
    state.selected.clear();
    return showMarks();
  }
  state.focus = "images";
  if (event.ctrlKey || event.metaKey) {
    if (state.selected.has(row)) state.selected.delete(row);
    else state.selected.add(row);
  } else if (event.shiftKey && state.view === "wall" && wall.position.has(state.current) && wall.position.has(row)) {
    const [from, to] = [wall.position.get(state.current), wall.position.get(row)].sort((a, b) => a - b);
    for (const between of wall.rows.slice(from, to + 1)) state.selected.add(between);
  } else {
    state.selected.clear();
  }
  state.current = row;
  showMarks();
  showDetails();
}

function selectImages(list) {
  state.selected = new Set(list);
  state.focus = "images";
  if (list.length) state.current = list.reduce((best, row) => (rows.typicality[row] > rows.typicality[best] ? row : best));
  showMarks();
  showDetails();
}

/** What K and D act on. */
function targets() {
  if (state.selected.size) return [...state.selected];
  if (state.focus === "images" && state.current >= 0) return [state.current];
  return state.chosen.size || state.list ? Array.from(chosenRows()) : [];
}

function keepOrDrop(action, list = targets(), what = plural(list.length, "image")) {
  if (!list.length) return say("Choose an image or a cluster first.");
  record({ action, images: list.map((row) => ids[row]) });
  say(`${action === "drop" ? "Dropped" : "Kept"} ${what}.`, true);
  if (list.length === 1 && list[0] === state.current && state.view === "wall") moveInWall(1, 0);
}

// --- names ---

/** Open the field for a name: of the selected images, or of the chosen clusters. */
function startNaming({ merge = false } = {}) {
  if (state.selected.size) state.naming = { images: [...state.selected] };
  else if (state.list && !state.chosen.size) state.naming = { images: Array.from(state.list.rows) };
  else {
    if (!state.chosen.size) {
      const first = nextUnnamed();
      if (!first) return say(state.nodes.size ? "Every cluster has a name." : "There are no clusters yet.");
      choose(first);
    }
    if (merge && state.chosen.size < 2) return say("Choose two or more clusters first: tick their boxes, or hold Shift and use the arrow keys.");
    state.naming = { paths: [...state.chosen] };
  }
  showBar();
  $("name").select();
}

function acceptName(text) {
  const name = cleanName(text), { paths, images } = state.naming;
  state.naming = null;
  if (images) {
    record({ action: "label", images: images.map((row) => ids[row]), name });
    state.selected.clear();
    showMarks();
    say(name ? `Labelled ${plural(images.length, "image")} “${name}”.` : "Labels removed.", true);
    return;
  }
  record({ action: "name", clusters: paths, name });
  say(name ? `Named ${paths.length > 1 ? plural(paths.length, "cluster") : titleOf(paths[0])}.` : "Name removed.", true);
  const next = name && nextUnnamed(paths.at(-1));
  if (!next) {
    showChoice();
    $("tree").focus();
    return;
  }
  choose(next);
  startNaming();
}

/** The next cluster without a name after a path, on the level of that path, or the first one. */
function nextUnnamed(path = "") {
  const level = state.nodes.get(path)?.level ?? 1;
  const candidates = [...nodesInOrder()].filter((node) => node.level === level || (node.level < level && !node.inner.length));
  const after = candidates.findIndex((node) => node.path === path) + 1;
  return [...candidates.slice(after), ...candidates.slice(0, after)].find((node) => !isNamed(node))?.path ?? "";
}

/** Names to suggest: labels that the images had before come first, then names by how often they were given. */
function suggestions(text) {
  const counts = new Map();
  const add = (name, weight) => name && counts.set(name, (counts.get(name) || 0) + weight);
  for (const label of state.resolved.labels) add(label, 1 / count);
  for (const name of state.resolved.names.values()) add(name, 0);
  const { paths, images } = state.naming;
  const list = images ?? paths.flatMap((path) => Array.from(state.nodes.get(path).rows));
  for (const row of list) add(labelOf(row), 1);
  const wanted = text.trim().toLowerCase();
  return [...counts].filter(([name]) => name.toLowerCase().includes(wanted) && name !== text)
    .sort((a, b) => b[0].toLowerCase().startsWith(wanted) - a[0].toLowerCase().startsWith(wanted) || b[1] - a[1])
    .slice(0, SUGGESTIONS).map(([name]) => name);
}

// --- splits ---

/** Divide images in two by 2-means on the leading principal components; both parts in the order of the rows. */
function twoMeans(list) {
  const width = perImage.components;
  const value = (row, i) => rows.components[row * width + i];
  const mean = (part) => Float64Array.from({ length: width }, (_, i) => part.reduce((sum, row) => sum + value(row, i), 0) / part.length);
  const distance = (row, centre) => centre.reduce((sum, c, i) => sum + (value(row, i) - c) ** 2, 0);
  const farthest = (centre) => list.reduce((best, row) => (distance(row, centre) > distance(best, centre) ? row : best));
  const point = (row) => Float64Array.from({ length: width }, (_, i) => value(row, i));
  const one = farthest(mean(list)), other = farthest(point(one));
  let centres = [point(one), point(other)], parts = [list, []];
  for (let round = 0; round < 30; round++) {
    const next = [[], []];
    for (const row of list) next[distance(row, centres[1]) < distance(row, centres[0]) ? 1 : 0].push(row);
    const settled = next[0].length === parts[0].length && next[0].every((row, i) => row === parts[0][i]);
    parts = next;
    if (settled || !parts[0].length || !parts[1].length) break;
    centres = parts.map(mean);
  }
  return parts[0].length >= parts[1].length ? parts : [parts[1], parts[0]];
}

function split() {
  if (state.selected.size) return splitOff([...state.selected]);
  const node = state.nodes.get(lastChosen());
  if (!node) return say("Choose a cluster to split first.");
  if (node.inner.length) {
    state.open.add(node.path);
    return choose(node.inner[0].path);
  }
  if (node.rows.length < 2 || !perImage.components) return say("This cluster cannot be split further.");
  const parts = twoMeans(Array.from(node.rows));
  if (!parts[1].length) return say("All images of this cluster look the same to the features.");
  proposeSplit(`Split ${titleOf(node.path)} in two?`, parts, () => {
    record({ action: "split", cluster: node.path, images: parts[0].map((row) => ids[row]) });
    state.open.add(node.path);
    choose(`${node.path}.1`);
  });
}

/** Make clusters of their own of the selected images, one in each cluster that they come from. */
function splitOff(list) {
  const byCluster = new Map();
  for (const row of list) {
    const path = state.resolved.paths[row];
    if (path) byCluster.set(path, [...(byCluster.get(path) ?? []), row]);
  }
  const partial = [...byCluster].filter(([path, part]) => part.length < state.nodes.get(path).rows.length);
  if (!partial.length) return say("The selection is whole clusters: there is nothing to split off.");
  const others = partial.flatMap(([path, part]) => Array.from(state.nodes.get(path).rows).filter((row) => !part.includes(row)));
  const from = partial.length === 1 ? titleOf(partial[0][0]) : plural(partial.length, "cluster");
  proposeSplit(`Split the selection off ${from}?`, [partial.flatMap(([, part]) => part), others], () => {
    record(...partial.map(([cluster, part]) => ({ action: "split", cluster, images: part.map((row) => ids[row]) })));
    for (const [path] of partial) state.open.add(path);
    choose(`${partial[0][0]}.1`);
    for (const [path] of partial.slice(1)) choose(`${path}.1`, { add: true });
  });
}

function proposeSplit(title, parts, accept) {
  const column = (part, i) => element("div", {}, element("h3", {}, `${i ? "The others" : "First part"}, ${plural(part.length, "image")}`),
    element("div", { class: "sample" }, ordered(part, "typical").slice(0, 18).map(thumbnail)));
  showDialog(title, [element("div", { class: "parts" }, parts.map(column))], [
    ["Split", () => {
      accept();
      say("Split.", true);
    }, "primary"], ["Cancel"]]);
}

// --- panels ---

function showAll() {
  showChoice();
  if (inbox) inbox.mark();
  showMarks();
  showDetails();
  const named = state.resolved.labels.reduce((sum, label) => sum + (label !== ""), 0);
  const actions = liveEvents(state.events).length;
  $("counter").replaceChildren(element("b", {}, `${number(named)} of ${number(count)} named`), ` · ${percent(named / (count || 1))} · ${plural(actions, "action")}`);
  $("undo").disabled = !actions;
  const open = content.inbox.filter((group) => !isDecided(group, stateOf)).length;
  $("inbox-count").textContent = number(open + content.unreadable.length);
}

function showChoice() {
  showTree();
  showBar();
  showWall();
  shadeMap();
}

function showMarks() {
  wall.mark();
  if (inbox) inbox.mark();
  shadeMap();
  showSelection();
}

function showTree() {
  const tree = $("tree"), focused = lastChosen();
  if (!state.nodes.size) {
    tree.replaceChildren(element("p", { class: "empty" }, "Clusters come with a later stage."));
    return;
  }
  const all = element("div", { class: `node all${state.chosen.size || state.list ? "" : " chosen"}`, role: "treeitem", "aria-level": 1,
    onclick: () => choose("") }, element("span", { class: "name" }, "All images"), element("span", { class: "size" }, number(count)));
  const items = [all];
  for (const node of nodesInOrder(state.roots, true)) items.push(treeItem(node));
  tree.replaceChildren(...items);
  const item = focused && $(`node-${focused}`);
  if (item) {
    tree.setAttribute("aria-activedescendant", item.id);
    item.scrollIntoView({ block: "nearest" });
  } else tree.removeAttribute("aria-activedescendant");
}

function treeItem(node) {
  const own = state.resolved.names.get(node.path), name = nameOf(node.path), open = state.open.has(node.path);
  const item = element("div", {
    class: `node${state.chosen.has(node.path) ? " chosen" : ""}${isNamed(node) ? " named" : ""}`, role: "treeitem",
    id: `node-${node.path}`, "aria-level": node.level, "aria-selected": state.chosen.has(node.path),
    "aria-expanded": node.inner.length ? String(open) : null,
    "aria-label": `${name || "cluster"} ${node.path}, ${plural(node.rows.length, "image")}`,
    onclick: (event) => choose(node.path, { add: event.ctrlKey || event.metaKey || event.shiftKey }),
    ondblclick: () => startNaming(),
  },
  element("button", { type: "button", class: "twist", tabindex: "-1", "aria-hidden": "true", onclick: (event) => {
    event.stopPropagation();
    if (!state.open.delete(node.path)) state.open.add(node.path);
    showTree();
  } }, node.inner.length ? (open ? "▾" : "▸") : ""),
  treePicture(node),
  element("span", { class: "name" }, own ? element("span", {}, own) : element("i", {}, name || commonLabel(node) || `cluster ${node.path}`),
    (name || commonLabel(node)) && element("small", {}, node.path)),
  element("span", { class: "size" }, number(node.rows.length)),
  element("input", { type: "checkbox", tabindex: "-1", "aria-label": `Choose cluster ${node.path} too`, onclick: (event) => {
    event.stopPropagation();
    choose(node.path, { add: true });
  } }));
  item.style.paddingInlineStart = `${0.4 + 0.9 * (node.level - 1)}rem`;
  item.style.setProperty("--group", colourOf(node.path));
  item.lastChild.checked = state.chosen.has(node.path);
  return item;
}

const treePictures = new Recent(1000);

function treePicture(node) {
  const key = `${node.path} ${node.rows[0]}`;
  if (!treePictures.get(key)) treePictures.set(key, thumbnail(node.rows[0]));
  return treePictures.get(key);
}

/** The label from before that at least half of a cluster's images have, with a question mark. */
function commonLabel(node) {
  const counts = new Map();
  for (const row of node.rows) if (rows.label[row] !== undefined && labelOf(row)) counts.set(labelOf(row), (counts.get(labelOf(row)) || 0) + 1);
  for (const [label, size] of counts) if (size * 2 >= node.rows.length) return `${label}?`;
  return "";
}

/** The bar above the views: what is shown, and what can be done with it; or the field for a name. */
function showBar() {
  if (state.naming) return showNaming();
  const path = lastChosen(), node = state.nodes.get(path);
  const button = (text, key, action, hint) => element("button", { type: "button", onclick: action, title: hint }, text, element("kbd", { "aria-hidden": "true" }, key));
  let title = "All images", about = plural(count, "image");
  if (count < content.total) about += ` shown of ${number(content.total)}`;
  if (state.list) [title, about] = [state.list.title, plural(state.list.rows.length, "image")];
  else if (state.chosen.size > 1) [title, about] = [plural(state.chosen.size, "cluster"), plural(chosenRows().length, "image")];
  else if (node) {
    title = nameOf(path) || `Cluster ${path}`;
    about = plural(node.rows.length, "image") + (node.cohesion === null ? "" : ` · cohesion ${node.cohesion.toFixed(2)}`);
  }
  const trail = element("nav", { class: "trail", "aria-label": "Cluster path" });
  if (node && state.chosen.size === 1 && !state.list) {
    for (const above of [...pathsUp(path)].reverse()) {
      trail.append(element("a", { href: "#", onclick: (event) => { event.preventDefault(); choose(above); } }, stepOf(above)));
    }
  }
  const actions = [];
  if (state.chosen.size > 1) actions.push(button("Merge under one name", "M", () => startNaming({ merge: true }), "One name for all chosen clusters"));
  else if (state.chosen.size || state.list) actions.push(button("Name", "N", () => startNaming(), "Give a name"));
  else if (state.nodes.size) actions.push(button("Name clusters", "N", () => startNaming(), "Name one cluster after the other"));
  if (state.chosen.size === 1) actions.push(button(node.inner.length ? "Open" : "Split", "S", split, "Show inner clusters, or divide this one"));
  if (state.chosen.size || state.list) {
    const act = (action) => () => keepOrDrop(action, Array.from(chosenRows()));
    actions.push(button("Keep", "K", act("keep"), "Keep these images"), button("Drop", "D", act("drop"), "Leave these images out"));
  }
  const orders = element("div", { class: "orders", role: "group", "aria-label": "Order of the wall" }, Object.entries(ORDERS).map(([order, { label }]) =>
    element("button", { type: "button", "aria-pressed": String(order === state.order), onclick: () => { state.order = order; showBar(); showWall(); } }, label)));
  $("bar").replaceChildren(element("div", { class: "what" }, trail, element("h2", {}, title), element("p", {}, about)),
    element("div", { class: "buttons" }, actions), state.nodes.size ? orders : "");
}

function showNaming() {
  const { paths, images } = state.naming;
  const what = images ? plural(images.length, "image") : paths.length > 1 ? plural(paths.length, "cluster") : `cluster ${paths[0]}`;
  const rowsShown = images ?? paths.flatMap((path) => Array.from(state.nodes.get(path).rows.subarray?.(0, 6) ?? state.nodes.get(path).rows.slice(0, 6)));
  const list = element("div", { class: "suggestions", role: "listbox", id: "names", "aria-label": "Names given already" });
  let highlighted = -1;
  const field = element("input", { id: "name", type: "text", autocomplete: "off", maxlength: 200, role: "combobox", "aria-expanded": "true",
    "aria-controls": "names", "aria-label": `Name of ${what}`, placeholder: "Name", value: images ? "" : nameOf(paths[0]) });
  const fill = (text) => {
    highlighted = -1;
    list.replaceChildren(...suggestions(text).map((name) => element("button", { type: "button", role: "option", tabindex: "-1", "aria-selected": "false",
      onclick: () => acceptName(name) }, name)));
  };
  field.addEventListener("input", () => fill(field.value));
  field.addEventListener("keydown", (event) => {
    if (event.isComposing) return;
    if (event.key === "Enter") acceptName(highlighted >= 0 ? list.children[highlighted].textContent : field.value);
    else if (event.key === "Escape") stopNaming();
    else if (event.key === "ArrowDown" || event.key === "ArrowUp" || (event.key === "Tab" && list.children.length && !event.shiftKey)) {
      const step = event.key === "ArrowUp" ? -1 : 1, { length } = list.children;
      if (!length) return;
      list.children[highlighted]?.setAttribute("aria-selected", "false");
      highlighted = (highlighted + step + length) % length;
      list.children[highlighted].setAttribute("aria-selected", "true");
    } else return;
    event.preventDefault();
    event.stopPropagation();
  });
  fill("");  // all, also where there is a name already
  const form = element("div", { class: "naming" },
    element("div", { class: "sample" }, ordered(rowsShown, "typical").slice(0, 8).map(thumbnail)),
    element("label", { for: "name" }, `Name of ${what}`),
    element("div", { class: "row" }, field, element("button", { type: "button", class: "primary", onclick: () => acceptName(field.value) }, images ? "Label" : "Name, and next"),
      element("button", { type: "button", onclick: stopNaming }, "Cancel")), list);
  $("bar").replaceChildren(form);
  field.focus();
}

function stopNaming() {
  state.naming = null;
  showBar();
  $(state.view === "wall" ? "wall" : "tree").focus();
}

function showWall() {
  if (state.view !== "wall") return;
  wall.show(ordered(chosenRows(), state.order));
}

function showSelection() {
  const { size } = state.selected, box = $("selection");
  box.hidden = !size;
  if (!size) return;
  const button = (text, key, action) => element("button", { type: "button", onclick: action }, text, element("kbd", { "aria-hidden": "true" }, key));
  box.replaceChildren(element("b", {}, `${plural(size, "image")} selected`), element("div", { class: "buttons" },
    button("Label", "N", () => startNaming()), button("Split off", "S", split),
    button("Keep", "K", () => keepOrDrop("keep")), button("Drop", "D", () => keepOrDrop("drop")),
    state.view !== "wall" && button("Show", "↵", () => showList(`${plural(size, "image")} selected`, [...state.selected])),
    button("Clear", "Esc", () => { state.selected.clear(); showMarks(); })));
}

function showList(title, list) {
  state.list = { title, rows: list };
  state.chosen.clear();
  state.selected.clear();
  showView("wall");
  showChoice();
  showSelection();
}

function showDetails() {
  const row = state.current, box = $("details");
  if (row < 0) {
    box.replaceChildren(element("p", { class: "empty" }, "Choose an image to see it with its neighbours."));
    return;
  }
  const node = nodeOf(row), label = state.resolved.labels[row];
  const [width, height] = [rows.sizes[2 * row], rows.sizes[2 * row + 1]];
  const facts = [["Size", `${number(width)} × ${number(height)} pixels`]];
  if (node) {
    facts.push(["Cluster", element("span", {}, [...pathsUp(node.path)].reverse().map((path) => element("a", { href: "#", class: "step",
      onclick: (event) => { event.preventDefault(); choose(path); } }, stepOf(path))))]);
  }
  facts.push(["Name", label || element("i", {}, "none yet")]);
  if (labelOf(row)) facts.push(["Label from before", labelOf(row)]);
  const flags = KINDS_OF_FLAGS.filter((_, bit) => rows.flags[row] & (1 << bit));
  if (flags.length) facts.push(["Looks", flags.join(", ")]);
  if (stateOf(row)) facts.push(["Decided", stateOf(row)]);
  const link = originalOf(row);
  const act = (action) => () => { state.selected.clear(); keepOrDrop(action, [row]); };
  const near = neighboursOf(row);
  box.replaceChildren(
    element("div", { class: `picture${stateOf(row) === "dropped" ? " dropped" : ""}` }, thumbnail(row)),
    element("h2", {}, content.keys[row]),
    link ? element("p", {}, element("a", { href: link, target: "_blank", rel: "noopener noreferrer" }, "Open the original")) : "",
    element("dl", {}, facts.map(([name, value]) => element("div", {}, element("dt", {}, name), element("dd", {}, value)))),
    element("div", { class: "buttons" }, element("button", { type: "button", onclick: act("keep") }, "Keep"), element("button", { type: "button", onclick: act("drop") }, "Drop"),
      element("button", { type: "button", onclick: () => { state.selected = new Set([row]); startNaming(); } }, "Label"),
      map && element("button", { type: "button", onclick: () => { showView("map"); map.fitTo([row, ...near.map(([other]) => other)]); } }, "On the map")),
    node ? element("section", {}, element("h3", {}, "Why it is here"), element("p", {}, reason(row))) : "",
    near.length ? element("section", {}, element("h3", {}, "Nearest images"), element("div", { class: "near" }, near.map(([other, cosine]) =>
      element("button", { type: "button", class: "tile", title: printable(content.keys[other]), "aria-label": `${printable(content.keys[other])}, cosine ${cosine.toFixed(2)}`,
        onclick: () => pick(other) }, thumbnail(other), element("small", {}, cosine.toFixed(2)))))) : "");
}

function neighboursOf(row) {
  const near = [];
  for (let i = row * perImage.neighbours; i < (row + 1) * perImage.neighbours; i++) {
    if (rows.neighbours[i] >= 0) near.push([rows.neighbours[i], rows.similarity[i] / 32767]);
  }
  return near;
}

/** Address of the original; only files and web pages, whatever the list of addresses says. */
function originalOf(row) {
  if (!content.href) return "";
  try {
    const { protocol, href } = new URL(content.href[row], location.href);
    return ["file:", "http:", "https:"].includes(protocol) ? href : "";
  } catch {
    return "";
  }
}

/** Why an image is where it is, in one or two sentences. */
function reason(row) {
  const typicality = rows.typicality[row], margin = rows.margin[row], runner = content.clusters[rows.runnerUp[row]];
  const place = typicality > 0.75 ? "It is among the typical images of its cluster" : typicality > 0.25 ? "It is neither typical nor odd for its cluster"
    : "It is at the edge of its cluster";
  const first = typicality > 0.99 ? `${place}, one of the first.` : `${place}: more typical than ${percent(typicality)} of them.`;
  const other = runner && (margin < 0.03
    ? `It is nearly as close to ${titleOf(runner.path)} (its cosine is lower by only ${margin.toFixed(3)}), so it may belong there.`
    : `The second nearest is ${titleOf(runner.path)}, with a cosine lower by ${margin.toFixed(2)}.`);
  const odd = rows.outlier[row] > 0.95 && `It is odd: ${percent(rows.outlier[row])} of all images have nearer neighbours.`;
  return [first, odd || other].filter(Boolean).join(" ");
}

// --- the map's colours and labels ---

/** Colour of a cluster: hues far apart for the clusters of the first level, a little different inside. */
function colourOf(path) {
  const [first, second = 0, third = 0] = path.split(".").map(Number);
  const light = matchMedia("(prefers-color-scheme: dark)").matches ? 0.74 : 0.62;
  const lightness = light + 0.035 * ((second % 3) - 1) + 0.015 * ((third % 3) - 1);
  return `oklch(${lightness.toFixed(3)} 0.12 ${((first * 137.5 + 40) % 360).toFixed(1)})`;
}

/** Red, green, blue of a cluster's colour. */
function bytesOf(path) {
  if (!colours.has(path)) {
    const context = element("canvas", { width: 1, height: 1 }).getContext("2d", { willReadFrequently: true });
    context.fillStyle = path ? colourOf(path) : "#888";
    context.fillRect(0, 0, 1, 1);
    colours.set(path, context.getImageData(0, 0, 1, 1).data);
  }
  return colours.get(path);
}

const colours = new Map();

/** Give the map its colours: bright is what is selected, or chosen; dropped images are faint. */
function shadeMap() {
  if (!map || state.view !== "map") return;
  const shades = new Uint8Array(4 * count), some = state.selected.size || state.chosen.size || state.list;
  const bright = new Uint8Array(count).fill(some ? 0 : 1);
  if (some) for (const row of state.selected.size ? state.selected : chosenRows()) bright[row] = 1;
  for (let row = 0; row < count; row++) {
    shades.set(bytesOf(state.resolved.paths[row]), 4 * row);
    shades[4 * row + 3] = stateOf(row) === "dropped" ? 30 : bright[row] ? 255 : 80;
  }
  map.shade(shades);
}

/** Where the names of clusters stand on the map: the larger the map, the finer the clusters. */
function mapLabels(zoom) {
  const level = zoom < 1.8 ? 1 : zoom < 4 ? 2 : Infinity;
  const labels = [];
  for (const node of nodesInOrder()) {
    const named = state.resolved.names.has(node.path);
    const isFinest = node.level === level || (node.level < level && !node.inner.length);
    if (!named && (!isFinest || nameOf(node.path))) continue;  // one label for all that a name covers
    if (node.level > level) continue;
    node.middle ??= middleOf(node);
    labels.push({ row: node.middle, text: printable(nameOf(node.path) || node.path), named, size: node.rows.length });
  }
  return labels.sort((a, b) => b.named - a.named || b.size - a.size);
}

/** The image of a cluster that is nearest to the median of their places. */
function middleOf(node) {
  const sample = node.rows.filter((_, i) => i % Math.ceil(node.rows.length / 300) === 0);
  const median = (axis) => Float64Array.from(sample, (row) => rows.place[2 * row + axis]).sort()[sample.length >> 1];
  const x = median(0), y = median(1);
  const distance = (row) => Math.hypot(rows.place[2 * row] - x, rows.place[2 * row + 1] - y);
  return sample.reduce((best, row) => (distance(row) < distance(best) ? row : best));
}

// --- views, search, dialogs ---

function showView(view) {
  if (view === "map" && !rows.place) view = "wall";
  state.view = document.body.dataset.view = view;
  for (const tab of document.querySelectorAll('[role="tab"]')) tab.setAttribute("aria-selected", String(tab.dataset.view === view));
  if (view === "inbox") {
    inbox ??= new Inbox($("view-inbox"), { pick, marked, drop: (list, what) => keepOrDrop("drop", list, what), keep: (list, what) => keepOrDrop("keep", list, what),
      label: (list) => { state.selected = new Set(list); startNaming(); }, showAll: (group) => showList(group.why || group.kind, group.rows) });
    inbox.mark();
  }
  if (view === "map") {
    map ??= new ImageMap($("map"), { pick, marked, lasso: (list) => { selectImages(list); setLasso(false); }, labels: mapLabels });
    shadeMap();
    map.resize();
  }
  showWall();
  if (state.selected.size) showSelection();
}

function setLasso(on) {
  map.lassoing = on;
  $("lasso").setAttribute("aria-pressed", String(on));
  $("map").classList.toggle("lassoing", on);
}

function search(text) {
  const wanted = text.trim().toLowerCase(), box = $("found"), field = $("search");
  box.hidden = !wanted;
  field.setAttribute("aria-expanded", String(!box.hidden));
  if (!wanted) return;
  const option = (content_, action) => element("button", { type: "button", role: "option", tabindex: "-1", "aria-selected": "false", onclick: () => {
    box.hidden = true;
    field.value = "";
    field.blur();
    action();
  } }, content_);
  const clusters = [...nodesInOrder()].filter((node) => node.path === wanted || state.resolved.names.get(node.path)?.toLowerCase().includes(wanted)).slice(0, 8);
  const options = clusters.map((node) => option([element("b", {}, nameOf(node.path) || `cluster ${node.path}`), element("small", {}, `${node.path}, ${plural(node.rows.length, "image")}`)],
    () => choose(node.path)));
  const matching = (title, of) => {
    const list = [];
    for (let row = 0; row < count; row++) if (of(row).toLowerCase().includes(wanted)) list.push(row);
    if (list.length) options.push(option([title, element("small", {}, plural(list.length, "image"))], () => showList(`“${text.trim()}”`, list)));
  };
  matching("Names given", (row) => state.resolved.labels[row]);
  matching("Labels from before", labelOf);
  matching("Names of files", (row) => content.keys[row]);
  box.replaceChildren(...(options.length ? options : [element("p", { class: "empty" }, "Nothing has this name.")]));
}

let toastTimer = 0;

/** A short message at the bottom. */
function say(text, undoable = false) {
  $("toast").replaceChildren(element("span", {}, text), undoable && element("button", { type: "button", onclick: undo }, "Undo") || "");
  $("toast").classList.add("shown");
  clearTimeout(toastTimer);
  toastTimer = setTimeout(() => $("toast").classList.remove("shown"), 6000);
}

function showDialog(title, children, buttons) {
  const dialog = $("dialog");
  dialog.replaceChildren(element("h2", {}, title), ...children, element("div", { class: "buttons" }, buttons.map(([text, action, kind]) =>
    element("button", { type: "button", class: kind ?? "", onclick: () => { dialog.close(); action?.(); } }, text))));
  dialog.showModal();
  dialog.querySelector("button.primary")?.focus();
}

const KEYS = [["N", "name the chosen cluster; Enter goes on to the next without a name"], ["M", "merge: one name for several chosen clusters"],
  ["S", "open a cluster, or split it in two"], ["K, D", "keep, drop: the selection, the image, or the cluster"], ["U", "undo"],
  ["Arrows", "move among clusters or images"], ["Shift and arrows", "choose several clusters"], ["Space", "select an image"], ["/", "search"], ["1, 2, 3", "map, wall, inbox"],
  ["Esc", "close, clear"], ["Shift and drag", "lasso on the map"]];

function showHelp() {
  showDialog("How it works", [
    element("p", {}, "Look at a cluster on the wall, press N, and type what its images have in common. Split what is mixed, merge what belongs together. The inbox has copies and odd images."),
    element("p", {}, "Nothing leaves this page, and no image is changed. What you decide is kept in this browser; “Save names” writes it as names.json, which “tessella label” reads."),
    element("dl", { class: "keys" }, KEYS.map(([key, text]) => element("div", {}, element("dt", {}, element("kbd", {}, key)), element("dd", {}, text)))),
  ], [["Close", null, "primary"], ["Load names…", () => $("file").click()]]);
}

function showBanner() {
  const [first = "", ...others] = content.banner;
  const unfinished = content.stages.filter(([, how]) => !how.startsWith("done"));
  const table = (entries) => element("table", {}, element("tbody", {}, entries.map(([name, value]) =>
    element("tr", {}, element("th", { scope: "row" }, name), element("td", {}, value)))));
  $("banner").replaceChildren(element("details", {},
    element("summary", {}, element("span", {}, first || "About this atlas"),
      unfinished.length > 0 && element("b", {}, `Still to come: ${unfinished.map(([name, how]) => (how === "to do" ? name : `${name} (${how})`)).join(", ")}`)),
    element("div", {}, others.map((sentence) => element("p", {}, sentence)),
      unfinished.length ? element("p", {}, "This page is written again after each stage. Reload it then.") : "",
      element("h3", {}, "Stages"), table(content.stages), element("h3", {}, "Provenance"), table(content.facts))));
}

// --- saving and loading ---

function save() {
  const text = namesText(content.atlas, content.revision, state.events);
  const address = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  const link = element("a", { href: address, download: "names.json" });
  link.click();
  setTimeout(() => URL.revokeObjectURL(address), 10000);
  say("Saved as names.json. Move it into the atlas' folder, or name it with --names.");
}

async function load(file) {
  if (!file) return;
  try {
    const events = eventsFrom(await file.text(), content.atlas, content.revision);
    state.events = mergedLogs(events, state.events);
    keepEvents();
    resolve();
    say(`Loaded ${plural(events.length, "event")}.`);
  } catch (error) {
    say(error.message);
  }
}

// --- keys ---

function moveInWall(across, down) {
  const next = wall.neighbour(state.current, across, down);
  if (next < 0) return;
  pick(next);
  wall.scrollTo(next);
}

function moveInTree(key, add) {
  const shown = [...nodesInOrder(state.roots, true)], at = shown.findIndex((node) => node.path === lastChosen()), node = shown[at];
  if (key === "ArrowDown") choose(shown[Math.min(at + 1, shown.length - 1)]?.path ?? "", { add });
  else if (key === "ArrowUp") choose(at > 0 ? shown[at - 1].path : "", { add: add && at > 0 });
  else if (key === "ArrowRight" && node?.inner.length) {
    if (state.open.has(node.path)) choose(node.inner[0].path);
    else { state.open.add(node.path); showTree(); }
  } else if (key === "ArrowLeft" && node) {
    if (node.inner.length && state.open.delete(node.path)) showTree();
    else if (node.parent) choose(node.parent.path);
  }
}

function arrow(key, add) {
  const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[key];
  const focused = document.activeElement;
  if (map && focused === map.overlay) map.move(-60 * steps[0], -60 * steps[1]);
  else if (focused === $("tree") || (state.focus === "tree" && focused !== $("wall"))) moveInTree(key, add);
  else if (state.view === "wall") moveInWall(...steps);
  else return false;
  return true;
}

function space() {
  if (state.focus === "images" && state.current >= 0) pick(state.current, { ctrlKey: true });
  else return false;
  return true;
}

function escape() {
  if (state.selected.size) { state.selected.clear(); showMarks(); }
  else if (map?.lassoing) setLasso(false);
  else if (state.list || state.chosen.size) choose("");
}

const ACTIONS = {
  n: () => startNaming(), m: () => startNaming({ merge: true }), s: split, k: () => keepOrDrop("keep"), d: () => keepOrDrop("drop"), u: undo,
  "/": () => $("search").focus(), "?": showHelp, Escape: escape, 1: () => showView("map"), 2: () => showView("wall"), 3: () => showView("inbox"),
  "+": () => map?.zoom(1.4), "=": () => map?.zoom(1.4), "-": () => map?.zoom(1 / 1.4), 0: () => map?.fit(),
};

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing || $("dialog").open) return;
  const typing = event.target.matches?.("input:not([type=checkbox])");
  if (typing) {
    if (event.target === $("search")) searchKey(event);
    return;
  }
  const onButton = event.target.matches?.("button, a, summary");
  let done = true;
  if (event.key.startsWith("Arrow")) done = arrow(event.key, event.shiftKey);
  else if (event.key === " " && !onButton) done = space();
  else if (event.key === "Enter" && !onButton && state.selected.size) showList(`${plural(state.selected.size, "image")} selected`, [...state.selected]);
  else if (ACTIONS[event.key] || ACTIONS[event.key.toLowerCase()]) (ACTIONS[event.key] ?? ACTIONS[event.key.toLowerCase()])();
  else done = false;
  if (done) event.preventDefault();
}

function searchKey(event) {
  const options = [...$("found").querySelectorAll("button")], at = options.findIndex((option) => option.getAttribute("aria-selected") === "true");
  if (event.key === "Escape") {
    $("search").value = "";
    search("");
    $("search").blur();
  } else if (event.key === "Enter") (options[at] ?? options[0])?.click();
  else if ((event.key === "ArrowDown" || event.key === "ArrowUp") && options.length) {
    options[at]?.setAttribute("aria-selected", "false");
    options[(at + (event.key === "ArrowDown" ? 1 : -1) + options.length) % options.length].setAttribute("aria-selected", "true");
  } else return;
  event.preventDefault();
}

// --- start ---

function start() {
  wall = new Wall($("wall"), { pick, marked });
  showBanner();
  $("undo").onclick = undo;
  $("save").onclick = save;
  $("help").onclick = showHelp;
  $("load").onclick = () => $("file").click();
  $("file").onchange = (event) => {
    load(event.target.files[0]);
    event.target.value = "";
  };
  $("lasso").onclick = () => setLasso(!map.lassoing);
  $("zoom-in").onclick = () => map.zoom(1.6);
  $("zoom-out").onclick = () => map.zoom(1 / 1.6);
  $("zoom-all").onclick = () => map.fit();
  $("search").oninput = (event) => search(event.target.value);
  $("wall").addEventListener("focus", () => { state.focus = "images"; });
  $("tree").addEventListener("focus", () => { state.focus = "tree"; });
  document.addEventListener("keydown", onKey);
  document.addEventListener("click", (event) => {
    if (!event.target.closest(".search")) $("found").hidden = true;
  });
  for (const tab of document.querySelectorAll('[role="tab"]')) {
    tab.addEventListener("click", () => showView(tab.dataset.view));
    if (tab.dataset.view === "map" && !rows.place) {
      tab.disabled = true;
      tab.title = "The map comes with a later stage.";
    }
  }
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    colours.clear();
    showTree();
    shadeMap();
  });
  if (state.roots.length === 1) state.open.add(state.roots[0].path);
  resolve();
  showView(rows.place ? "map" : "wall");
}

start();
