"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const count = (n, word) => `${n.toLocaleString("en")} ${word}${n === 1 ? "" : "s"}`;
const percent = (part, whole) => (whole ? `${((100 * part) / whole).toFixed(part && part * 20 < whole ? 1 : 0)} %` : "0 %");

function make(name, properties, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(properties || {})) {
    if (value === undefined || value === null || value === false) continue;
    if (key === "class") element.className = value;
    else element.setAttribute(key, value);
  }
  element.append(...children);
  return element;
}
const dot = (status) => make("i", { class: `dot ${status}`, "aria-hidden": "true" });

// ---- text: what cannot be seen gets a sign, and what would steer the page's own text (controls, direction marks) is shown as its code

const hidden = /[\n\t\u0000-\u001f\u007f-\u009f\u00ad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff]/u;
const parts = new RegExp(`${hidden.source}|(?:(?!${hidden.source})[\\s\\S])+`, "gu");

function write(element, text) {
  for (const part of text.match(parts) || []) {
    const code = part.codePointAt(0);
    if (!hidden.test(part)) element.append(part);
    else if (part === "\n") element.append(make("i", { class: "sign", "data-sign": "↵" }, "\n"));
    else if (part === "\t") element.append(make("i", { class: "sign", "data-sign": "⇥" }, "\t"));
    else if (code >= 0xdc80 && code <= 0xdcff) element.append(make("i", { class: "sign code", "data-sign": (code - 0xdc00).toString(16).toUpperCase(), title: "a byte that is no whole character" }));
    else element.append(make("i", { class: "sign code", "data-sign": `U+${code.toString(16).padStart(4, "0").toUpperCase()}` }));
  }
  return element;
}

// ---- samples, one `article` each, with filters and keys. The page's script has `state`, which the address keeps, `apply`, which shows what passes, and `enlarge`.

const articles = [];

// Again a frame later: the samples above take their true height only when they come near
function reveal(article) {
  article.scrollIntoView();
  requestAnimationFrame(() => article.scrollIntoView());
}

function readAddress() {
  const given = new URLSearchParams(location.hash.slice(1));
  for (const name of Object.keys(state)) state[name] = given.get(name) || "";
  if (!["light", "dark"].includes(state.theme)) state.theme = "";
  apply();
  if (articles[state.sample]) reveal(articles[state.sample]);
}

function set(changes) {
  Object.assign(state, changes);
  apply();
}

const isDark = () => (state.theme ? state.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches);
const toggleTheme = () => set({ theme: isDark() ? "light" : "dark" });

function showState() {
  if (state.theme) document.documentElement.dataset.theme = state.theme;
  else delete document.documentElement.dataset.theme;
  byId("theme").textContent = isDark() ? "Light" : "Dark";
  articles.forEach((article, number) => (String(number) === state.sample ? article.setAttribute("aria-current", "true") : article.removeAttribute("aria-current")));
  const kept = Object.entries(state).filter(([, value]) => value);
  history.replaceState(null, "", kept.length ? `#${new URLSearchParams(kept)}` : location.pathname + location.search);
}

function move(step) {
  const visible = articles.map((article, number) => (article.hidden ? -1 : number)).filter((number) => number >= 0);
  if (!visible.length) return;
  const here = visible.indexOf(Number(state.sample || -1));
  const next = here < 0 ? visible[step > 0 ? 0 : visible.length - 1] : visible[Math.min(Math.max(here + step, 0), visible.length - 1)];
  set({ sample: String(next) });
  articles[next].focus({ preventScroll: true });
  reveal(articles[next]);
}

function neighbour(step) {
  const images = [...document.querySelectorAll(".sample:not([hidden]) .image")];
  const next = images[images.indexOf(byId("large").opener) + step];
  if (next) enlarge(next);
}

function watchKeys(more) {
  const actions = {
    j: () => move(1), ArrowRight: () => move(1), k: () => move(-1), ArrowLeft: () => move(-1), f: () => byId("find").focus(), "/": () => byId("find").focus(),
    d: toggleTheme, "?": () => byId("help").showModal(), ...more,
  };
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (byId("large").open) {
      if (event.key === "ArrowRight" || event.key === "j") neighbour(1);
      if (event.key === "ArrowLeft" || event.key === "k") neighbour(-1);
      return;
    }
    if (byId("help").open) return;
    if (event.target.matches("input, select")) {
      if (event.key === "Escape") event.target.blur();
      return;
    }
    if (!Object.hasOwn(actions, event.key)) return;
    event.preventDefault();
    actions[event.key]();
  });
  byId("theme").onclick = toggleTheme;
  byId("ask").onclick = () => byId("help").showModal();
  for (const dialog of document.querySelectorAll("dialog")) dialog.onclick = (event) => event.target === dialog && dialog.close();
  matchMedia("(prefers-color-scheme: dark)").onchange = apply;
  addEventListener("hashchange", readAddress);
}
