/* The network, run here: a prompt, codes forced and blocked in it, and what comes next. */

const machine = data.machine;
const N_WRITTEN = machine ? 8 : 4;  // continuations

// A prompt as tokens, and tokens as text; as in minicode/fsm.py and language/tokenizer.py

const PIECES = / ?[\p{L}\p{N}_]+| ?[^\p{L}\p{N}_\s]|\s+/gu;
const SEPARATOR = 256;  // below it are the bytes, above it the pieces
const pieces = new Map(network && !machine ? data.vocab.map((text, id) => [text, id]).slice(SEPARATOR + 1) : []);
const utf8 = new TextEncoder();

function encode(text) {
  if (!machine) {
    const found = text.match(PIECES) ?? [];
    return [SEPARATOR, ...found.flatMap((piece) => pieces.get(piece) ?? [...utf8.encode(piece)])];
  }
  const digits = [...text.toLowerCase()].filter((digit) => digit.trim());
  const ids = digits.map((digit) => data.vocab.indexOf(digit));
  if (ids.includes(-1)) throw new Error(`a prompt is states, from ${machine.states[0]} to ${machine.states.at(-1)}`);
  return [data.vocab.length - 1, ...ids];
}

/** The text of tokens behind the first one. */
function decode(tokens) {
  if (machine) return statesIn(tokens).join(" ");
  const bytes = tokens.slice(1).flatMap((id) => (id < SEPARATOR ? id : [...utf8.encode(data.vocab[id])]));
  return new TextDecoder().decode(new Uint8Array(bytes));
}

/** The states in tokens of the machine; the last may lack digits. */
function statesIn(tokens) {
  const text = tokens.slice(1).map(token);
  const states = [];
  for (let i = 0; i < text.length; i += machine.digits) states.push(text.slice(i, i + machine.digits).join(""));
  return states;
}

const successors = (state) => (machine.successors[machine.states.indexOf(state)] ?? []).map((i) => machine.states[i]);

// Chance: the same numbers for both sides, so that what differs is due to the codes

function chance(seed) {  // mulberry32
  return () => {
    seed = (seed + 0x6d2b79f5) | 0;
    let t = Math.imul(seed ^ (seed >>> 15), 1 | seed);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
  };
}

function draw(p, number) {
  const id = p.findIndex((share) => (number -= share) < 0);
  return id < 0 ? p.length - 1 : id;
}

// Edits: { kind: "force" or "block", code, position }, a position of null: where tokens are written;
// { kind: "as", text, position }: all codes that the network has behind another prompt

function placeOf(row) {
  if (network.books[row]) return { site: row, group: 0 };
  const cut = row.lastIndexOf(".");
  return { site: row.slice(0, cut), group: Number(row.slice(cut + 1)) };
}

/** Edits that force a whole state at one position. */
function forceState(state, position) {
  return state.map((code) => ({ kind: "force", ...placeOf(code.row), id: code.id, first: position, last: position }));
}

/** What is read of tokens, with edits: the past, and x behind the last. */
function readAll(tokens, edits = []) {
  const past = network.past();
  let x;
  for (const id of tokens) x = network.read(past, id, edits);
  return { past, x };
}

/** Edits as the network takes them, and the runs whose codes are put in, with how long they go on. */
function resolve(edits, length) {
  const resolved = [], others = [];
  for (const { kind, code, text, position } of edits) {
    if (kind === "as") {
      const tokens = encode(text);
      const { past } = readAll(tokens);
      resolved.push(...forceState(statesOf(past).at(-1), position));
      // On the machine, until the digits of the next state are complete.
      const more = machine && position === length - 1 ? machine.digits - 1 - ((tokens.length - 1) % machine.digits) : 0;
      others.push({ past, more });
    } else {
      const [first, last] = position === null ? [length - 1, Infinity] : [position, position];
      resolved.push({ kind, ...placeOf(code.row), id: code.id, first, last });
    }
  }
  return { resolved, others };
}

/** n tokens that follow what was read, with edits, drawn by `random`. */
function goOn({ past, x }, { resolved, others }, n, random) {
  past = structuredClone(past);
  others = structuredClone(others);
  const tokens = [];
  for (let i = 0; i < n && past.length < network.config.block_size; i++) {
    const id = draw(softmax(network.logits(x)), random());
    tokens.push(id);
    const edits = [...resolved];
    for (const other of others.filter(({ more }) => i < more)) {
      network.read(other.past, id);
      edits.push(...forceState(statesOf(other.past).at(-1), past.length));
    }
    x = network.read(past, id, edits);
  }
  return tokens;
}

// What is shown

const touch = {
  tokens: [],
  edits: [],
  chosen: null,  // { position, row }; row null: the token
  seed: 1,

  /** Shows a prompt, with these edits. */
  ask(tokens, edits = []) {
    const most = network.config.block_size;
    const kept = tokens.slice(0, most);
    Object.assign(this, { tokens: kept, edits, chosen: { position: kept.length - 1, row: null } });
    find("prompt").value = decode(kept);
    this.run(tokens.length > most ? `The network reads ${most} tokens; what comes after them is left out.` : "");
    touchGrid.scrollTo(kept.length - 1);
  },

  edit(edit) {
    this.edits.push(edit);
    this.run();
  },

  /** Runs the prompt left alone and with edits, and shows what differs; the last edit is dropped if it can't be. */
  run(complaint = "") {
    const free = readAll(this.tokens);
    let edits, forced;
    try {
      edits = resolve(this.edits, this.tokens.length);
      forced = readAll(this.tokens, edits.resolved);
    } catch (error) {
      this.edits.pop();
      return this.run(error.message);
    }
    find("complaint").textContent = complaint;
    this.states = statesOf(forced.past);
    showEdits();
    showGrid(statesOf(free.past), edits.resolved);
    showPanel();
    showNext(free, forced);
    showWritten(free, forced, edits);
  },
};
const touchGrid = network && new Grid(find("touch").querySelector(".grid"), "The prompt and its codes", (position, row) => {
  touch.chosen = { position, row };
  showPanel();
}, false);

const at = (position) => (position === null ? "wherever it writes" : `at position ${position}`);

function showEdits() {
  const items = touch.edits.map((edit) => {
    const verb = edit.kind === "block" ? "blocked" : "forced";
    const what = edit.kind === "as" ? `codes of ${edit.text || "the beginning"}` : edit.code.name;
    const remove = () => {
      touch.edits = touch.edits.filter((other) => other !== edit);
      touch.run();
    };
    const label = { class: "small", "aria-label": `no longer ${verb}: ${what}` };
    return make("li", { class: verb }, `${what} ${verb} ${at(edit.position)} `, button("×", remove, label));
  });
  find("edits").replaceChildren(...items);
  find("clear").disabled = !items.length;
}

function showGrid(free, edits) {
  const placed = (position, { site, group }) => edits.filter((edit) => edit.site === site && edit.group === group
    && edit.first <= position && position <= edit.last);
  const isForced = (position, code) => placed(position, placeOf(code.row)).some(({ kind, id }) => kind === "force" && id === code.id);
  const states = touch.states.map((state, position) => {
    const forced = (code) => isForced(position, code);
    return [...state.filter(forced), ...state.filter((code) => !forced(code))];  // of each place, those first
  });
  const names = (state, row) => state.filter((code) => code.row === row).map((code) => code.name).join();
  touchGrid.draw(touch.tokens, states, (position, row) => {
    if (placed(position, placeOf(row)).length) return "forced";
    return names(free[position], row) === names(touch.states[position], row) ? "" : "changed";
  });
}

function showPanel() {
  const { position, row } = touch.chosen;
  touchGrid.select(position);
  const text = token(touch.tokens[position]).trim() || "␣";
  const there = touch.states[position];
  const parts = row ? codePanel(position, row, there.filter((code) => code.row === row)) : tokenPanel(position, there);
  const title = make("h3", {}, row ? make("span", { class: "mono" }, row) : "The state", " after ", make("mark", {}, text), ` at position ${position}`);
  find("touch").querySelector(".panel").replaceChildren(title, ...parts);
}

/** A form of one field; act(value) may throw what is then shown as a complaint. */
function ask(label, name, attributes, act) {
  const input = make("input", { ...attributes, "aria-label": label, spellcheck: "false", autocomplete: "off" });
  const form = make("form", { class: "tools" }, make("span", {}, label), input, make("button", {}, name));
  form.onsubmit = (event) => {
    event.preventDefault();
    try {
      act(input.value.trim());
    } catch (error) {
      find("complaint").textContent = error.message;
    }
  };
  return form;
}

function tokenPanel(position, state) {
  const act = (text) => {
    encode(text);
    touch.edit({ kind: "as", text, position });
  };
  const example = machine ? machine.demonstration[1] : data.prompt;
  return [ask("Put in the codes that it has after", "Put in", { placeholder: example, class: "mono" }, act), stateList(state)];
}

function codePanel(position, row, chosen) {
  const there = codes.filter((code) => code.row === row).sort(ORDERS.f1);  // of a label, the best first
  const act = (text) => {
    const code = there.find(({ name, id, label }) => [name, String(id), label].includes(text));
    if (!code) throw new Error(`${text || "that"} is no code of ${row}: they are written as ${chosen[0].name}`);
    touch.edit({ kind: "force", code, position });
  };
  const living = there.filter((code) => code.count);
  const options = living.map((code) => make("option", { value: code.name }, meaning(code)));
  const lines = chosen.map((code) => make("li", {},
    make("a", { href: address(code), "data-code": code.name, class: "mono" }, code.name), ` ${meaning(code)} `,
    button("block it", () => touch.edit({ kind: "block", code, position }), { class: "small" })));
  return [
    make("ul", { class: "plain" }, ...lines),
    ask("Force another there:", "Force", { list: "codes-of-row", placeholder: living[0]?.name, class: "mono" }, act),
    make("datalist", { id: "codes-of-row" }, ...options),
  ];
}

function showNext(free, forced) {
  const before = softmax(network.logits(free.x)), after = softmax(network.logits(forced.x));
  let ids = [...before.keys()];
  if (!machine) ids = ids.sort((a, b) => Math.max(before[b], after[b]) - Math.max(before[a], after[a])).slice(0, 10);
  find("next").replaceChildren(...pairs(ids.map((id) => [token(id).trim() || "␣", before[id], after[id]]), 3));
}

/** Writes on, left alone and with edits; one continuation at a time, so that the page stays quick. */
function showWritten(free, forced, edits) {
  const last = touch.tokens.length - 1;
  const as = touch.edits.find((edit) => edit.kind === "as" && edit.position === last);
  const own = machine && statesIn(touch.tokens).at(-1);
  const sides = [
    { name: "left alone", kind: "free", from: free, how: { resolved: [], others: [] }, state: own },
    { name: "with your codes", kind: "forced", from: forced, how: edits, state: as ? statesIn(encode(as.text)).at(-1) : own },
  ].slice(0, touch.edits.length ? 2 : 1);
  for (const side of sides) {
    side.list = make("ol", {}, ...Array.from({ length: N_WRITTEN }, () => make("li", {}, "\u00a0")));
    side.about = make("p", { class: "soft" }, machine ? follow(side.state) : "");
    side.sum = make("p", { class: "soft" }, machine ? "\u00a0" : "");
    side.texts = [];
  }
  const parts = sides.map(({ name, kind, list, about, sum }) => [make("span", { class: `key ${kind}` }, name), about, list, sum]);
  find("written").replaceChildren(...parts.map((some) => make("div", {}, ...some)));
  let number = 0;
  const next = () => {
    const side = sides[number % sides.length], i = Math.floor(number / sides.length);
    if (!side.list.isConnected) return;
    if (i === N_WRITTEN) return machine && sides.forEach((side) => { side.sum.textContent = count(side, sides); });
    const tokens = goOn(side.from, side.how, machine ? 5 * machine.digits : 32, chance(1000 * touch.seed + i));
    side.texts.push(tokens);
    side.list.children[i].replaceChildren(...written(tokens, side.state));
    number++;
    setTimeout(next);
  };
  next();
}

// On the machine: whether what is written follows

function follow(state) {
  const after = successors(state);
  return after.length ? `${state} may be followed by ${after.join(" ")}` : "\u00a0";
}

/** The states that tokens written complete, with the last one given: [state, ...]. */
function writtenStates(tokens) {
  const given = Math.max(0, Math.floor((touch.tokens.length - 1) / machine.digits) - 1);
  return statesIn([...touch.tokens, ...tokens]).slice(given);
}

/** How many of the texts begin with a state that may follow that of each side. */
function count(side, sides) {
  const firsts = side.texts.map((tokens) => writtenStates(tokens)[1]);
  const states = [...new Set(sides.map(({ state }) => state))].filter((state) => successors(state).length);
  const follows = (state) => firsts.filter((first) => successors(state).includes(first)).length;
  return states.map((state) => `${follows(state)} of ${firsts.length} may follow ${state}`).join(", ");
}

/** Tokens that were written. On the machine the state is shown that the first one should follow. */
function written(tokens, state) {
  if (!machine) return [visible(decode([SEPARATOR, ...tokens]))];
  return writtenStates(tokens).flatMap((name, i, all) => {
    if (i === 0) return [make("span", { class: "soft" }, name)];
    const before = i === 1 ? state : all[i - 1];
    const astray = name.length === machine.digits && !successors(before).includes(name);
    const look = astray ? { class: "astray", title: `${name} may not follow ${before}` } : { class: i === 1 ? "first" : "" };
    return [" → ", make("span", look, name)];
  });
}

function startTouching() {
  find("touch").hidden = !network;
  if (!network) return;
  const show = () => {
    try {
      const tokens = encode(find("prompt").value);
      const edits = touch.edits.filter(({ position }) => position === null || position < tokens.length);
      const typed = find("prompt").value;
      touch.ask(tokens, edits);
      find("prompt").value = typed;
    } catch (error) {
      find("complaint").textContent = error.message;
    }
  };
  if (machine) {
    const { states, successors: edges, demonstration: [here, there] } = machine;
    find("machine").textContent = `It reads the digits of a machine that walks between ${states.length} states, from each
      to one of ${edges[0].length}. Nobody told it that there are states. Here it has read ${here}, and the codes there
      are those that it has after ${there}: so it goes on as from ${there}.`;
  }
  if (data.steered.length) find("machine").textContent = "It writes on, with the codes of a topic forced at every token.";
  find("prompt").oninput = show;
  find("ask").onsubmit = (event) => event.preventDefault();
  find("clear").onclick = () => {
    touch.edits = [];
    touch.run();
  };
  find("again").onclick = () => {
    touch.seed++;
    touch.run();
  };
  const shows = machine ? [demonstration()] : data.steered.map(steering);
  const buttons = shows.map(([name, prompt, edits]) => button(name, () => touch.ask(encode(prompt), edits())));
  if (buttons.length) find("shows").append(machine ? "Demonstration:" : "Make it write about:", ...buttons);
  const [, prompt, edits] = shows[0] ?? ["", data.prompt, () => []];
  touch.ask(encode(prompt), edits());
}

/** A topic's codes, forced wherever the network writes. */
function steering([topic, names]) {
  return [topic, data.prompt, () => names.map((name) => ({ kind: "force", code: codeNamed(name), position: null }))];
}

/** What `sample --force-code` does: a run in one state is made to act as if in another. */
function demonstration() {
  const [here, there] = machine.demonstration;
  const edits = () => [{ kind: "as", text: there, position: machine.digits }];
  return [`in ${here}, act as in ${there}`, here, edits];
}
