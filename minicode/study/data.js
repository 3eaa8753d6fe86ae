/* The data of the page, and what all of its parts use. */
"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const find = (id) => document.getElementById(id);

/** An element with attributes and children; text goes in as text, whatever it holds. */
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

/** A button that does something. */
function button(text, act, attributes = {}) {
  const element = make("button", { type: "button", ...attributes }, text);
  element.onclick = act;
  return element;
}

const whole = (value) => value.toLocaleString("en");
const share = (value, digits = 2) => (value === null ? "–" : value.toFixed(digits));
const percent = (value) => (100 * value).toFixed(2) + " %";
const collator = new Intl.Collator("en", { numeric: true });

// The codes. Of those that the page holds nothing of, only the name is known.

function makeCode([name, count, words, precision, recall, ...more]) {
  const [places, misses, falseAlarms, next, near, together] = more;
  const f1 = words && precision + recall ? (2 * precision * recall) / (precision + recall) : 0;
  const label = words ? words.join(" ") : null;
  const cut = name.lastIndexOf(".");
  return {
    name,
    count,
    words,
    label,
    precision,
    recall,
    f1,
    places,
    misses,
    falseAlarms,
    next,
    near,
    together,
    row: name.slice(0, cut), // where it is chosen: head.0.3, mlp.1
    id: Number(name.slice(cut + 1)),
    fits: label !== null && f1 >= data.fits,
    text: `${name} ${label ?? ""}`.toLowerCase(),
  };
}

const codes = data.codes.map(makeCode);
const byName = new Map(codes.map((code) => [code.name, code]));

function codeNamed(name) {
  return byName.get(name) ?? makeCode([name, null, null, null, null, [], [], [], [], [], []]);
}

/** What a code stands for, in words. */
function meaning(code) {
  if (code.fits) return code.label;
  if (code.count === null) return "left out of this page";
  if (code.count === 0) return "dead: never chosen";
  return "no label fits";
}

/** The same, and what is nearest where no label fits. */
function about(code) {
  const other = code.fits || code.label === null ? "" : `; nearest: ${code.label}`;
  return meaning(code) + other;
}

/** The nearest label where none fits, with its figures. */
function nearest(code) {
  if (code.fits || code.label === null) return "";
  const figures = `precision ${share(code.precision)}, recall ${share(code.recall)}`;
  return `nearest: ${code.label} (${figures})`;
}

// Tokens

const visible = (text) => text.replaceAll("\n", "↵").replaceAll("\t", "⇥");
const typed = (text) => text.replaceAll("↵", "\n").replaceAll("⇥", "\t");
const token = (id) => visible(data.vocab[id]);

/** Whether a group of tokens, such as a state, starts at a position. */
const starts = (position) => data.group > 0 && position > 0 && (position - 1) % data.group === 0;

const nSequences = data.length ? data.tokens.length / data.length : 0;
const sequence = (number) => data.tokens.slice(number * data.length, (number + 1) * data.length);

/** A token in its context: what is before, the token, and what is behind it. */
function context(place, before, after) {
  const position = place % data.length;
  const tokens = sequence((place - position) / data.length);
  const gap = (at) => (starts(at) && at < data.length ? "\u2009" : ""); // a thin space
  const text = (from, to) =>
    tokens
      .slice(from, to)
      .map((id, i) => (i ? gap(from + i) : "") + token(id))
      .join("");
  const from = Math.max(0, position - before),
    to = Math.min(data.length, position + 1 + after);
  return [
    make("span", { class: "before" }, (from ? "…" : "") + text(from, position) + gap(position)),
    make("mark", {}, token(tokens[position])),
    make(
      "span",
      { class: "after" },
      gap(position + 1) + text(position + 1, to) + (to < data.length ? "…" : ""),
    ),
  ];
}

/** Two bars for each of some tokens: [[text, left alone, forced], ...], and what stands behind. */
function pairs(rows, digits, note = () => "") {
  const most = Math.max(1e-9, ...rows.flatMap(([, free, forced]) => [free, forced ?? 0]));
  const bar = (value, kind) => {
    const line = make("i");
    line.style.width = `${(100 * value) / most}%`;
    return make(
      "div",
      { class: `bar ${kind}` },
      make("span", { class: "track" }, line),
      make("b", {}, value.toFixed(digits)),
    );
  };
  return rows.flatMap(([text, free, forced], i) => [
    make("span", { class: "token" }, text),
    make("div", {}, bar(free, "free"), ...(forced === undefined ? [] : [bar(forced, "forced")])),
    make("span", { class: "soft" }, note(i)),
  ]);
}
