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
