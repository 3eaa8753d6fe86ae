/* A sequence as a grid: tokens in a row, and below each the codes of the network's state. */

const MOST_ROWS = 12;
const grids = new Set();

/** The network of this page, if it holds one. */
const network =
  data.network && new Network({ ...data.network, numbers: fromBase64(data.network.numbers) });

function fromBase64(text) {
  const binary = atob(text);
  const bytes = new Uint8Array(binary.length);
  for (let i = 0; i < bytes.length; i++) bytes[i] = binary.charCodeAt(i);
  return new Float32Array(bytes.buffer);
}

/** What a past of the network chose at each position: lists of codes, row by row, as chosen. */
function statesOf(past) {
  return Array.from({ length: past.length }, (_, position) => {
    const state = [];
    for (const [site, chosen] of Object.entries(past.codes)) {
      chosen[position].forEach((ids, group) => {
        const row = chosen[position].length > 1 ? `${site}.${group}` : site;
        state.push(...ids.map((id) => codeNamed(`${row}.${id}`)));
      });
    }
    return state;
  });
}

/** A state by rows: {"head.0.3": [codes, the first chosen first], ...}. */
function byRow(state) {
  const rows = new Map();
  for (const code of state) {
    if (!rows.has(code.row)) rows.set(code.row, []);
    rows.get(code.row).push(code);
  }
  return rows;
}

/** Rows to show of states: all, or those that say the most. */
function rowsToShow(states) {
  const said = new Map();
  for (const state of states) {
    for (const [row, [first]] of byRow(state)) said.set(row, (said.get(row) ?? 0) + first.fits);
  }
  const rows = [...said.keys()]; // in the order in which the network runs through them
  if (!network) rows.sort(collator.compare); // of which only a part is known
  const best = [...rows].sort((a, b) => said.get(b) - said.get(a)).slice(0, MOST_ROWS);
  return rows.filter((row) => best.includes(row));
}

/** The page of a code, if there is one here. */
const address = (code) => (byName.has(code.name) ? "#" + code.name : undefined);

/** Draws a code as a chip: what it stands for in two lines, or its number. */
function chip(code, tag, attributes) {
  const [kind, name] = code.fits ? code.words : ["", String(code.id)];
  const title = `${code.name}: ${about(code)}`;
  const look = { class: code.fits ? "chip" : "chip bare", "data-code": code.name, title };
  return make(tag, { ...look, ...attributes }, make("small", {}, kind), make("b", {}, name));
}

/** A grid in an element. choose(position, row): a token (row null) or a chip was chosen. */
class Grid {
  constructor(box, label, choose, links) {
    Object.assign(this, { box, label, choose, links, cells: new Map(), at: [0, 1] });
    box.onkeydown = (event) => this.move(event);
    for (const event of ["focusin", "click"]) {
      box.addEventListener(event, ({ target }) => this.follow(target.closest("button, a")));
    }
    grids.add(this);
  }

  /** tokens [ids], states as statesOf gives them; look(position, row): a class for a cell. */
  draw(tokens, states, look = () => "") {
    const focused = this.box.contains(document.activeElement);
    const rows = rowsToShow(states),
      perToken = states.map(byRow);
    this.cells = new Map();
    const head = tokens.map((id, position) => {
      const choose = () => this.choose(position, null);
      const name = `token ${position}: ${token(id)}`;
      const text = token(id).trim() || "␣";
      const cell = button(text, choose, { class: "token", tabindex: -1, "aria-label": name });
      return make("th", { scope: "col", class: starts(position) ? "start" : undefined }, cell);
    });
    const body = rows.map((row) =>
      make(
        "tr",
        {},
        make("th", { scope: "row" }, row),
        ...tokens.map((_, position) =>
          this.cell(position, row, perToken[position].get(row) ?? [], look),
        ),
      ),
    );
    const table = make(
      "table",
      { role: "grid", "aria-label": this.label },
      make("thead", {}, make("tr", {}, make("td", {}), ...head)),
      make("tbody", {}, ...body),
    );
    this.box.replaceChildren(table);
    this.point(focused);
  }

  cell(position, row, codes, look) {
    const classes = [starts(position) ? "start" : "", look(position, row, codes)].join(" ").trim();
    const td = make("td", { class: classes || undefined });
    if (!codes.length) return td;
    const [first, ...others] = codes;
    const link = this.links ? { href: address(first) } : { type: "button" };
    const element = chip(first, this.links ? "a" : "button", { ...link, tabindex: -1 });
    if (!this.links) element.onclick = () => this.choose(position, row);
    if (others.length)
      element.append(make("i", { title: `and ${others.length} more` }, `+${others.length}`));
    td.append(element);
    for (const { name } of codes) this.cells.set(name, [...(this.cells.get(name) ?? []), td]);
    return td;
  }

  /** Marks the token whose state is shown. */
  select(position) {
    this.box
      .querySelectorAll("thead th")
      .forEach((th, i) => th.classList.toggle("chosen", i === position));
  }

  // Of all cells one can be reached by the tab key; the arrows go from there.

  target([row, column]) {
    return this.box.querySelector("table")?.rows[row]?.cells[column]?.querySelector("button, a");
  }

  point(focus) {
    if (!this.target(this.at)) this.at = [0, 1];
    const target = this.target(this.at);
    target?.setAttribute("tabindex", 0);
    if (focus) target?.focus({ preventScroll: true });
  }

  follow(element) {
    const cell = element?.closest("td, th");
    if (!cell) return;
    this.target(this.at)?.setAttribute("tabindex", -1);
    this.at = [cell.parentElement.rowIndex, cell.cellIndex];
    element.setAttribute("tabindex", 0);
  }

  move(event) {
    const steps = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
    const step = steps[event.key];
    if (!step) return;
    event.preventDefault();
    this.target([this.at[0] + step[0], this.at[1] + step[1]])?.focus();
  }

  /** Brings a position into view, without moving the page. */
  scrollTo(position) {
    const cell = this.target([0, position + 1])?.parentElement;
    if (cell) this.box.scrollLeft = cell.offsetLeft - this.box.clientWidth / 2;
  }
}

/** Lights up all places where a code fires; none: no place. */
function light(name) {
  for (const lit of document.querySelectorAll(".lit")) lit.classList.remove("lit");
  if (!name) return;
  for (const grid of grids)
    for (const cell of grid.cells.get(name) ?? []) cell.classList.add("lit");
  for (const element of document.querySelectorAll(".panel [data-code]")) {
    element.classList.toggle("lit", element.dataset.code === name);
  }
}

for (const event of ["pointerover", "focusin"]) {
  document.addEventListener(event, ({ target }) =>
    light(target.closest?.("[data-code]")?.dataset.code),
  );
}

/** A whole state, row by row, the first chosen first. */
function stateList(state) {
  return make(
    "dl",
    { class: "state" },
    ...[...byRow(state)].map(([row, codes]) =>
      make(
        "div",
        {},
        make("dt", {}, row),
        make(
          "dd",
          {},
          ...codes.map((code) =>
            make(
              "a",
              {
                href: address(code),
                "data-code": code.name,
                class: code.fits ? "" : "soft",
                title: code.name,
              },
              code.fits ? code.label : String(code.id),
            ),
          ),
        ),
      ),
    ),
  );
}

// Reading

const reading = { number: 0, position: 1, states: [] };
const nReadable = network ? nSequences : data.states.length;
const readGrid = new Grid(
  find("read").querySelector(".grid"),
  "A sequence and its codes",
  readToken,
  true,
);

/** The states of a sequence: the network's, or those that the page holds. */
function statesOfSequence(number) {
  if (!network) return data.states[number].map((state) => state.map((i) => codes[i]));
  const past = network.past();
  for (const id of sequence(number)) network.read(past, id);
  return statesOf(past);
}

function readSequence(number, position) {
  if (!(number >= 0 && number < nReadable)) return;
  if (number !== reading.number || !reading.states.length) {
    Object.assign(reading, { number, states: statesOfSequence(number) });
    readGrid.draw(sequence(number), reading.states);
  }
  find("number").value = number;
  readToken(position);
  readGrid.scrollTo(reading.position);
}

function readToken(position) {
  reading.position = Math.max(0, Math.min(position, reading.states.length - 1));
  const text = token(sequence(reading.number)[reading.position]).trim() || "␣";
  readGrid.select(reading.position);
  find("read")
    .querySelector(".panel")
    .replaceChildren(
      make(
        "h3",
        {},
        "The state after ",
        make("mark", {}, text),
        ` at position ${reading.position}`,
      ),
      stateList(reading.states[reading.position]),
    );
}

function startReading() {
  find("read").hidden = nReadable === 0;
  find("partly").hidden = Boolean(network) || !data.left_out;
  find("number").max = nReadable - 1;
  const beyond = nReadable < nSequences ? ` (of ${whole(nSequences)} that were recorded)` : "";
  find("of").textContent = `of ${whole(nReadable)}, from 0${beyond}`;
  find("number").onchange = () =>
    readSequence(Math.round(Number(find("number").value)), reading.position);
  find("earlier").onclick = () => readSequence(reading.number - 1, reading.position);
  find("later").onclick = () => readSequence(reading.number + 1, reading.position);
  find("from-here").hidden = !network;
  find("from-here").onclick = () => {
    touch.ask(sequence(reading.number).slice(0, reading.position + 1));
    find("touch").scrollIntoView();
  };
  if (nReadable) readSequence(0, Math.min(8, data.length - 1));
}
