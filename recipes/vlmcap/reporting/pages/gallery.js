"use strict";
const byId = (id) => document.getElementById(id);
const [text, sort, system, min, max, flagged, list] =
  ["text", "sort", "system", "min", "max", "flagged", "cards"].map(byId);
const fields = { text, sort, system, min, max };
const normalise = (value) => value.normalize("NFKC").toLowerCase();

const cards = [...list.children].map((element) => ({
  element,
  id: element.dataset.id,
  disagreement: Number(element.dataset.disagreement),
  scores: element.dataset.scores.split(" ").map(Number),
  flags: element.dataset.flags.split(" ").filter(Boolean).map(Number),
  text: normalise([...element.querySelectorAll(".text")].map((node) => node.textContent).join("\n")),
}));
const defaults = { text: "", sort: sort.options[0].value, system: "", min: "", max: "" };
let shown = cards;
let current = null;

// The score that filters and sorts: the chosen system's, or the mean of all.
function scoreOf(card) {
  const chosen = system.selectedIndex - 1;
  return chosen < 0 ? card.scores.reduce((a, b) => a + b, 0) / card.scores.length : card.scores[chosen];
}

const orders = {
  disagreement: (a, b) => b.disagreement - a.disagreement,
  worst: (a, b) => scoreOf(a) - scoreOf(b),
  id: (a, b) => a.id.localeCompare(b.id, "en", { numeric: true }),
};

function apply() {
  const words = normalise(text.value).split(/\s+/).filter(Boolean);
  const low = min.value === "" ? -Infinity : Number(min.value);
  const high = max.value === "" ? Infinity : Number(max.value);
  const chosen = system.selectedIndex - 1;
  shown = [];
  for (const card of [...cards].sort(orders[sort.value])) {
    const score = scoreOf(card);
    const show = score >= low && score <= high && words.every((word) => card.text.includes(word)) &&
      (!flagged.checked || (chosen < 0 ? card.flags.length > 0 : card.flags.includes(chosen)));
    card.element.hidden = !show;
    if (show) shown.push(card);
  }
  // Moving an element takes the focus from it.
  const focused = document.activeElement;
  list.append(...shown.map((card) => card.element));
  if (list.contains(focused)) focused.focus({ preventScroll: true });
  if (!shown.includes(current)) current = null;
  for (const card of cards) card.element.tabIndex = card === (current ?? shown[0]) ? 0 : -1;
  byId("status").textContent = shown.length
    ? `${shown.length} of ${cards.length} images, by ${sort.selectedOptions[0].text}`
    : "No image fits all of these filters.";
  remember();
}

// The state of the page is what comes after # in its address.
function remember() {
  const state = new URLSearchParams();
  for (const [name, field] of Object.entries(fields)) {
    if (field.value !== defaults[name]) state.set(name, field.value);
  }
  if (flagged.checked) state.set("flagged", "1");
  if (current) state.set("image", current.id);
  const hash = state.toString();
  history.replaceState(null, "", hash ? `#${hash}` : location.pathname + location.search);
}

function recall() {
  const state = new URLSearchParams(location.hash.slice(1));
  for (const [name, field] of Object.entries(fields)) {
    field.value = state.get(name) ?? defaults[name];
    // A select takes no value that is not one of its options.
    if (field.selectedIndex === -1) field.value = defaults[name];
  }
  flagged.checked = state.get("flagged") === "1";
  const image = cards.find((card) => card.id === state.get("image"));
  apply();
  if (shown.includes(image)) image.element.focus();
}

function step(by) {
  if (!shown.length) return;
  const place = shown.indexOf(current);
  const next = current ? Math.min(Math.max(place + by, 0), shown.length - 1) : 0;
  shown[next].element.focus();
}

function toggleHelp() {
  if (byId("help").open) byId("help").close();
  else byId("help").showModal();
}

const keys = {
  j: () => step(1),
  k: () => step(-1),
  ArrowRight: () => step(1),
  ArrowLeft: () => step(-1),
  s: () => {
    sort.selectedIndex = (sort.selectedIndex + 1) % sort.options.length;
    const onCard = current && document.activeElement === current.element;
    current = null;
    apply();
    if (onCard && shown.length) shown[0].element.focus();
  },
  f: () => {
    if (flagged.labels[0].hidden) return;
    flagged.checked = !flagged.checked;
    apply();
  },
  "/": () => {
    text.focus();
    text.select();
  },
  "?": toggleHelp,
};

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return;
  if (event.target === text && event.key === "Escape") {
    event.preventDefault();
    if (shown.length) (current ?? shown[0]).element.focus();
    return;
  }
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  const typing = event.target.closest("select, input:not([type=checkbox])");
  // Arrows scroll the tables and belong to an open help; letters can be switched off there.
  const taken = event.key.startsWith("Arrow") ? event.target.closest(".scroll, dialog") : !byId("keys").checked;
  if (typing || taken || !Object.hasOwn(keys, key) || (byId("help").open && key !== "?")) return;
  event.preventDefault();
  keys[key]();
});

list.addEventListener("focusin", (event) => {
  const element = event.target.closest(".card");
  if (current?.element === element) return;
  (current ?? shown[0]).element.tabIndex = -1;
  current = cards.find((card) => card.element === element);
  element.tabIndex = 0;
  element.scrollIntoView({ block: "nearest" });
  remember();
});
byId("controls").addEventListener("submit", (event) => event.preventDefault());
byId("controls").addEventListener("input", apply);
byId("open-help").addEventListener("click", toggleHelp);
byId("close-help").addEventListener("click", toggleHelp);
window.addEventListener("hashchange", recall);
recall();
