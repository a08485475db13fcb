// Names of clusters and labels of images: what follows from the log of events. tessella/atlas/names.py says the same.

const STEERING = /[\p{Cc}\p{Cf}\p{Cs}\p{Co}\p{Cn}\p{Zl}\p{Zp}]/gu;  // what could hide or turn around text

/** The events that count: without undo, and without what an undo has taken back. */
function liveEvents(events) {
  const live = [];
  for (const event of events) {
    if (event.action === "undo") live.pop();
    else live.push(event);
  }
  return live;
}

/** The clusters of which a cluster is a part, itself first: "2.1.3" -> "2.1.3", "2.1", "2". */
function* pathsUp(path) {
  for (; path; path = path.slice(0, Math.max(0, path.lastIndexOf(".")))) yield path;
}

/**
 * Resolve a log: a pure function.
 *
 * @param {string[]} paths path of each image's finest cluster, "" for none
 * @param {string[]} ids of the images, as in events
 * @param {object[]} events in their order
 * @returns {{names: Map<string, string>, paths: string[], labels: string[], states: string[], splits: string[]}}
 *   names of clusters by path; of each image the path after all splits, the label ("" for none), and "kept", "dropped"
 *   or ""; paths of the clusters that were split
 */
function resolveNames(paths, ids, events) {
  const names = new Map(), halves = new Map(), own = new Map(), states = new Map();
  for (const event of liveEvents(events)) {
    if (event.action === "name") for (const path of event.clusters) names.set(path, event.name);
    else if (event.action === "label") for (const id of event.images) own.set(id, event.name);
    else if (event.action === "split") halves.set(event.cluster, new Set(event.images));
    else for (const id of event.images) states.set(id, event.action === "drop" ? "dropped" : "kept");
  }
  for (const [path, name] of names) if (!name) names.delete(path);
  const current = paths.map((path, row) => {
    while (halves.has(path)) path += halves.get(path).has(ids[row]) ? ".1" : ".2";
    return path;
  });
  const labels = current.map((path, row) => {
    if (states.get(ids[row]) === "dropped") return "";
    if (own.get(ids[row])) return own.get(ids[row]);
    for (const above of pathsUp(path)) if (names.has(above)) return names.get(above);
    return "";
  });
  return { names, paths: current, labels, states: ids.map((id) => states.get(id) || ""), splits: [...halves.keys()] };
}

/** Two logs as one: what both begin with, then the rest of the first, then what only the second has. */
function mergedLogs(first, second) {
  const known = new Set(first.map((event) => JSON.stringify(event)));
  let common = 0;
  const same = () => JSON.stringify(first[common]) === JSON.stringify(second[common]);
  while (common < first.length && common < second.length && same()) common++;
  return first.concat(second.slice(common).filter((event) => !known.has(JSON.stringify(event))));
}

/** A log as the text of names.json. */
function namesText(atlas, revision, events) {
  return JSON.stringify({ format: "tessella names", version: 1, atlas, revision, events }, null, 1) + "\n";
}

/**
 * The events in the text of a names.json.
 *
 * @throws {Error} with a sentence for a person: it is no such file, or belongs to another atlas or clustering
 */
function eventsFrom(text, atlas, revision) {
  let file;
  try {
    file = JSON.parse(text);
  } catch {
    throw new Error("This file is no names.json: it is not JSON.");
  }
  if (file?.format !== "tessella names" || !Array.isArray(file.events)) {
    throw new Error("This file is no names.json of an atlas.");
  }
  if (file.version !== 1) throw new Error("This names.json is of another version of Tessella than this page.");
  if (file.atlas !== atlas) throw new Error("These names belong to another atlas.");
  if (file.revision !== revision) {
    throw new Error("These names belong to another clustering of these images. “tessella explore” carries them over.");
  }
  if (!file.events.every(isEvent)) throw new Error("This names.json holds an event that is not complete, or a name that is none.");
  return file.events;
}

/** A text as a name: on one line, without characters that steer, at most 200 characters. */
function cleanName(text) {
  return [...text.replace(/\s/gu, " ").replace(STEERING, "").trim()].slice(0, 200).join("").trim();
}

function isEvent(event) {
  const texts = (list) => Array.isArray(list) && list.every((item) => typeof item === "string");
  const isName = (text) => typeof text === "string" && cleanName(text) === text;
  switch (event?.action) {
    case "name": return texts(event.clusters) && isName(event.name);
    case "split": return typeof event.cluster === "string" && texts(event.images);
    case "label": return texts(event.images) && isName(event.name);
    case "drop": case "keep": return texts(event.images);
    case "undo": return true;
    default: return false;
  }
}
