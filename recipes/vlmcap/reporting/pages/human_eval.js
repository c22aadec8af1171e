"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const items = data.items;
const find = (id) => document.getElementById(id);
const storageName = `vlmcap-human/${data.fingerprint}`;
const questionsOf = (item) => (item.kind === "preference" ? ["choice"] : ["fluency", "adequacy", "hallucination"]);

// place: -1 the instructions, items.length the end. seconds: of each item, while it was on the screen.
let state = { session: randomName(), language: navigator.language.startsWith("ja") ? "ja" : "en", place: -1,
  answers: {}, seconds: {}, downloaded: true };
let stored = false;
let active = 0; // the question that a number key answers
let since = null; // when the item on the screen was last counted

function randomName() {
  return Array.from(crypto.getRandomValues(new Uint8Array(8)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

function save() {
  try {
    localStorage.setItem(storageName, JSON.stringify(state));
    stored = true;
  } catch {
    stored = false; // a private window, or a file:// page where the browser forbids it: download still works
  }
}

function restore() {
  try {
    const kept = JSON.parse(localStorage.getItem(storageName));
    if (kept) state = Object.assign(state, kept);
  } catch {
    // nothing kept, or nothing may be kept
  }
  save();
}

const complete = (item) => questionsOf(item).every((question) => question in (state.answers[item.id] || {}));
const openItems = () => items.filter((item) => !complete(item));

function countTime() {
  const now = performance.now();
  const item = items[state.place];
  if (item && since !== null) {
    state.seconds[item.id] = (state.seconds[item.id] || 0) + (now - since) / 1000;
    if (state.answers[item.id]) state.answers[item.id].seconds = Math.round(state.seconds[item.id] * 100) / 100;
  }
  since = document.hidden ? null : now;
}

function go(place) {
  countTime();
  state.place = Math.max(0, Math.min(items.length, place));
  since = document.hidden ? null : performance.now();
  const item = items[state.place];
  active = item ? Math.max(0, questionsOf(item).findIndex((q) => !(q in (state.answers[item.id] || {})))) : 0;
  save();
  show();
  find("main").focus({ preventScroll: true });
  window.scrollTo(0, 0);
}

function answer(question, value) {
  const item = items[state.place];
  countTime();
  const given = { ...state.answers[item.id], [question]: value, changed: Date.now() };
  given.seconds = Math.round((state.seconds[item.id] || 0) * 100) / 100;
  state.answers[item.id] = given;
  state.downloaded = false;
  active = Math.min(questionsOf(item).indexOf(question) + 1, questionsOf(item).length - 1);
  save();
  show();
  document.querySelector("fieldset.active")?.scrollIntoView({ block: "nearest" });
}

function showCaption(element, text) {
  element.textContent = text || (state.language === "ja" ? "（空）" : "(empty)");
  element.lang = /[\u3040-\u30ff\u3400-\u9fff]/.test(element.textContent) ? "ja" : "en";
}

function show() {
  const item = items[state.place];
  const atEnd = state.place === items.length;
  document.documentElement.lang = state.language;
  find("intro").hidden = state.place >= 0;
  find("item").hidden = !item;
  find("end").hidden = !atEnd;
  find("steps").hidden = state.place < 0;
  find("back").disabled = state.place <= 0;
  find("next").hidden = atEnd;
  find("stored").hidden = !stored;
  find("not-stored").hidden = stored;
  find("progress").value = items.length - openItems().length;
  find("count").textContent = `${item ? state.place + 1 : atEnd ? items.length : 0} / ${items.length}`;
  if (item) showItem(item);
  if (atEnd) showEnd();
}

function showItem(item) {
  find("item").dataset.kind = item.kind;
  const picture = data.pictures[item.image];
  const image = find("picture");
  if (image.getAttribute("src") !== picture.uri) image.src = picture.uri;
  image.width = picture.width;
  image.height = picture.height;
  image.classList.toggle("drawing", picture.drawing);
  image.alt = state.language === "ja" ? "説明される画像" : "the picture that is described";
  for (const kind of ["preference", "rating"]) {
    const part = find(kind);
    if (!part) continue;
    part.hidden = item.kind !== kind;
    if (!part.hidden) part.querySelectorAll(".caption").forEach((element, i) => showCaption(element, item.captions[i]));
  }
  const given = state.answers[item.id] || {};
  document.querySelectorAll("button[data-question]").forEach((button) => {
    button.setAttribute("aria-pressed", String(given[button.dataset.question]) === button.dataset.value);
  });
  document.querySelectorAll("fieldset").forEach((group) => {
    group.classList.toggle("active", group.dataset.question === questionsOf(item)[active]);
  });
  find("next-label").hidden = !complete(item);
  find("skip-label").hidden = complete(item);
  find("next").classList.toggle("primary", complete(item));
}

function showEnd() {
  const open = openItems().length;
  find("all-answered").hidden = open > 0;
  find("some-open").hidden = find("to-open").hidden = open === 0;
  find("open-count").textContent = open;
  find("downloaded").hidden = !(state.downloaded && Object.keys(state.answers).length);
  find("text").value = answersFile();
}

function answersFile() {
  const file = { format: data.format, rater: data.rater, fingerprint: data.fingerprint, session: state.session,
    saved: new Date().toISOString(), answers: state.answers };
  return JSON.stringify(file, null, 1);
}

function download() {
  countTime();
  const address = URL.createObjectURL(new Blob([answersFile()], { type: "application/json" }));
  const link = document.createElement("a");
  link.href = address;
  link.download = `answers_${data.rater}.json`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(address), 60000);
  state.downloaded = true;
  save();
  show();
}

// Joins the answers of a saved file with those here; of two answers to an item the later one stays.
function load(text) {
  const file = JSON.parse(text);
  if (file.format !== data.format || file.fingerprint !== data.fingerprint) throw new Error("another page");
  for (const item of items) {
    const [here, there] = [state.answers[item.id], file.answers[item.id]];
    if (there && typeof there === "object" && !(here && here.changed > there.changed)) {
      state.answers[item.id] = there;
      state.seconds[item.id] = there.seconds || 0;
    }
  }
  state.session = file.session;
  state.downloaded = false;
  const first = openItems()[0];
  go(first ? items.indexOf(first) : items.length);
}

find("load").addEventListener("change", async (event) => {
  const [file] = event.target.files;
  if (!file) return;
  try {
    load(await file.text());
    find("load-error").hidden = true;
    find("saving").open = false;
  } catch {
    find("load-error").hidden = false;
  }
  event.target.value = ""; // so that the same file can be chosen again
});
document.querySelectorAll("button[data-question]").forEach((button) => {
  const { question, value } = button.dataset;
  button.addEventListener("click", () => answer(question, /^\d$/.test(value) ? Number(value) : value));
});
document.querySelectorAll(".download").forEach((button) => button.addEventListener("click", download));
find("start").addEventListener("click", () => go(0));
find("next").addEventListener("click", () => go(state.place + 1));
find("back").addEventListener("click", () => go(state.place - 1));
find("to-open").addEventListener("click", () => go(items.indexOf(openItems()[0])));
find("language").addEventListener("click", () => {
  state.language = state.language === "ja" ? "en" : "ja";
  save();
  show();
});
document.addEventListener("visibilitychange", countTime);

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing || state.place < 0) return;
  if (event.target.closest("header, textarea, summary")) return;
  if (pressed(event)) event.preventDefault();
});

function pressed(event) {
  const item = items[state.place];
  if (event.key === "Backspace") {
    if (!event.repeat) go(state.place - 1);
    return true;
  }
  if (!item) return false;
  if (event.key === "Enter") {
    // On a button that is not chosen yet, Enter chooses it, as everywhere.
    if (event.target.matches("button[aria-pressed=false], #back")) return false;
    if (!event.repeat) go(state.place + 1);
    return true;
  }
  if (item.kind === "preference") {
    const choice = { ArrowLeft: "left", ArrowRight: "right", "=": "tie" }[event.key];
    if (choice) answer("choice", choice);
    return Boolean(choice);
  }
  const questions = questionsOf(item);
  if (event.key === "ArrowUp" || event.key === "ArrowDown") {
    active = Math.max(0, Math.min(questions.length - 1, active + (event.key === "ArrowUp" ? -1 : 1)));
    show();
    return true;
  }
  const yesNo = { n: "no", y: "yes" }[event.key.toLowerCase()];
  if (yesNo) answer("hallucination", yesNo);
  else if (/^[1-5]$/.test(event.key) && questions[active] !== "hallucination") answer(questions[active], Number(event.key));
  else return false;
  return true;
}

window.addEventListener("beforeunload", (event) => {
  countTime();
  save();
  if (!state.downloaded && (!stored || openItems().length === 0)) {
    event.preventDefault();
    event.returnValue = "";
  }
});

restore();
since = performance.now();
show();
