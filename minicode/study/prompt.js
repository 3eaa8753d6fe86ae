/* What the network is asked: a prompt, codes forced and blocked in it, and to go on. */

const machine = data.machine;

// A prompt as tokens, and tokens as text; as in minicode/fsm.py and language/tokenizer.py

const PIECES = / ?[\p{L}\p{N}_]+| ?[^\p{L}\p{N}_\s]|\s+/gu;
const SEPARATOR = 256; // below it are the bytes, above it the pieces
const pieces = new Map(
  network && !machine ? data.vocab.map((text, id) => [text, id]).slice(SEPARATOR + 1) : [],
);
const utf8 = new TextEncoder();

function encode(text) {
  if (!machine) {
    const found = text.match(PIECES) ?? [];
    return [SEPARATOR, ...found.flatMap((piece) => pieces.get(piece) ?? [...utf8.encode(piece)])];
  }
  const digits = [...text.toLowerCase()].filter((digit) => digit.trim());
  const ids = digits.map((digit) => data.vocab.indexOf(digit));
  if (ids.includes(-1))
    throw new Error(`a prompt is states, from ${machine.states[0]} to ${machine.states.at(-1)}`);
  return [data.vocab.length - 1, ...ids];
}

/** The text of tokens after the first one. */
function decode(tokens) {
  if (machine) return statesIn(tokens).join(" ");
  const bytes = tokens
    .slice(1)
    .flatMap((id) => (id < SEPARATOR ? id : [...utf8.encode(data.vocab[id])]));
  return new TextDecoder().decode(new Uint8Array(bytes));
}

/** The states in tokens of the machine; the last may lack digits. */
function statesIn(tokens) {
  const text = tokens.slice(1).map(token);
  const states = [];
  for (let i = 0; i < text.length; i += machine.digits)
    states.push(text.slice(i, i + machine.digits).join(""));
  return states;
}

const successors = (state) =>
  (machine.successors[machine.states.indexOf(state)] ?? []).map((i) => machine.states[i]);

// Chance: the same numbers for both sides, so that what differs is due to the codes

function chance(seed) {
  // mulberry32
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

// Edits: { kind: "force" or "block", code, position }, a position of null: wherever it writes;
// { kind: "as", text, position, row }: the codes that the network has after another prompt, in that
// row; a row of null: in all of them

function placeOf(row) {
  if (network.books[row]) return { site: row, group: 0 };
  const cut = row.lastIndexOf(".");
  return { site: row.slice(0, cut), group: Number(row.slice(cut + 1)) };
}

/** Edits that force the last state of a past at one position; a row of it, if there is one. */
function forceState(past, row, position) {
  const state = statesOf(past).at(-1);
  const codes = row ? state.filter((code) => code.row === row) : state;
  return codes.map((code) => ({
    kind: "force",
    ...placeOf(code.row),
    id: code.id,
    first: position,
    last: position,
  }));
}

/** What comes of reading tokens, with edits: the past, and x behind the last. */
function readAll(tokens, edits = []) {
  const past = network.past();
  let x;
  for (const id of tokens) x = network.read(past, id, edits);
  return { past, x };
}

/** Edits as the network takes them; and the runs whose codes are put in, with how far those go. */
function resolve(edits, length) {
  const resolved = [];
  const others = [];
  for (const { kind, code, text, row, position } of edits) {
    if (kind === "as") {
      const tokens = encode(text);
      const { past } = readAll(tokens);
      resolved.push(...forceState(past, row, position));
      // On the machine, until the digits of the next state are complete.
      const more =
        machine && position === length - 1
          ? machine.digits - 1 - ((tokens.length - 1) % machine.digits)
          : 0;
      others.push({ past, row, more });
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
      edits.push(...forceState(other.past, other.row, past.length));
    }
    x = network.read(past, id, edits);
  }
  return tokens;
}
