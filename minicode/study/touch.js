/* The network as it is touched: its codes below a prompt, what is forced there, what comes then. */

const touch = {
  tokens: [],
  edits: [],
  chosen: null, // { position, row }; row null: the token
  seed: 1,

  /** Shows a prompt, with these edits. */
  ask(tokens, edits = []) {
    const most = network.config.block_size;
    const kept = tokens.slice(0, most);
    Object.assign(this, { tokens: kept, edits, chosen: { position: kept.length - 1, row: null } });
    if (document.activeElement !== find("prompt")) find("prompt").value = visible(decode(kept));
    this.run(
      tokens.length > most
        ? `The network reads ${most} tokens; what comes after them is left out.`
        : "",
    );
    touchGrid.scrollTo(kept.length - 1);
  },

  edit(edit) {
    this.edits.push(edit);
    this.run();
    touchGrid.point(true); // back from the panel, which is new
  },

  /** Runs the prompt left alone and with edits, and shows both. What can't be done is dropped. */
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
const touchGrid =
  network &&
  new Grid(
    find("touch").querySelector(".grid"),
    "The prompt and its codes",
    (position, row) => {
      touch.chosen = { position, row };
      showPanel();
    },
    false,
  );

const at = (position) => (position === null ? "" : `at position ${position} `);

function showEdits() {
  const items = touch.edits.map((edit) => {
    const verb = edit.kind === "block" ? "blocked" : "forced";
    const { kind, text, row, code } = edit;
    const what =
      kind === "as" ? `codes of ${text || "nothing"}${row ? ` in ${row}` : ""}` : code.name;
    const remove = () => {
      touch.edits = touch.edits.filter((other) => other !== edit);
      touch.run();
      find("clear").focus();
    };
    const label = { class: "small", "aria-label": `no longer ${verb}: ${what}` };
    return make(
      "li",
      { class: verb },
      `${what} ${verb} ${at(edit.position)}`,
      button("×", remove, label),
    );
  });
  find("edits").replaceChildren(...items);
  find("clear").disabled = !items.length;
}

function showGrid(free, edits) {
  const placed = (position, { site, group }) =>
    edits.filter(
      (edit) =>
        edit.site === site &&
        edit.group === group &&
        edit.first <= position &&
        position <= edit.last,
    );
  const isForced = (position, code) =>
    placed(position, placeOf(code.row)).some(({ kind, id }) => kind === "force" && id === code.id);
  const states = touch.states.map((state, position) => {
    const forced = (code) => isForced(position, code);
    return [...state.filter(forced), ...state.filter((code) => !forced(code))]; // those first
  });
  const names = (state, row) =>
    state
      .filter((code) => code.row === row)
      .map((code) => code.name)
      .join();
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
  const parts = row
    ? codePanel(
        position,
        row,
        there.filter((code) => code.row === row),
      )
    : tokenPanel(position, there);
  const title = make(
    "h3",
    {},
    row ? make("span", { class: "mono" }, row) : "The state",
    " after ",
    make("mark", {}, text),
    ` at position ${position}`,
  );
  find("touch")
    .querySelector(".panel")
    .replaceChildren(title, ...parts);
}

/** A form of one field; act(value) may throw what is then shown as a complaint. */
function ask(label, name, attributes, act) {
  const input = make("input", {
    ...attributes,
    class: "mono",
    "aria-label": label,
    spellcheck: "false",
    autocomplete: "off",
  });
  const form = make(
    "form",
    { class: "tools" },
    make("span", {}, label),
    input,
    make("button", {}, name),
  );
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
  return [askState("Put in the codes that it has after", position, null), stateList(state)];
}

/** A form that puts in the codes that the network has after another prompt. */
function askState(label, position, row) {
  const example = machine ? machine.demonstration[1] : data.prompt;
  return ask(label, "Put in", { placeholder: example }, (text) => {
    encode(text);
    touch.edit({ kind: "as", text, row, position });
  });
}

function codePanel(position, row, chosen) {
  // Of those with one label, the best first.
  const there = codes.filter((code) => code.row === row).sort(ORDERS.f1);
  const act = (text) => {
    const code = there.find(({ name, id, label }) => [name, String(id), label].includes(text));
    if (!code) throw new Error(`${row} has no code ${text}: write ${chosen[0].name}, say`);
    touch.edit({ kind: "force", code, position });
  };
  const living = there.filter((code) => code.count);
  const options = living.map((code) => make("option", { value: code.name }, about(code)));
  const block = (code) =>
    button("block it", () => touch.edit({ kind: "block", code, position }), { class: "small" });
  const link = (code) =>
    make("a", { href: address(code), "data-code": code.name, class: "mono" }, code.name);
  const lines = chosen.map((code) => make("li", {}, link(code), ` ${about(code)} `, block(code)));
  const example = { list: "codes-of-row", placeholder: living[0]?.name };
  return [
    make("ul", { class: "plain" }, ...lines),
    ask("Force another there", "Force", example, act),
    askState(`Put in those that ${row} has after`, position, row),
    make("datalist", { id: "codes-of-row" }, ...options),
  ];
}

function showNext(free, forced) {
  const before = softmax(network.logits(free.x)),
    after = softmax(network.logits(forced.x));
  let ids = [...before.keys()];
  if (!machine)
    ids = ids
      .sort((a, b) => Math.max(before[b], after[b]) - Math.max(before[a], after[a]))
      .slice(0, 10);
  find("next").replaceChildren(
    ...pairs(
      ids.map((id) => [token(id).trim() || "␣", before[id], after[id]]),
      3,
    ),
  );
}

function startTouching() {
  find("touch").hidden = !network;
  if (!network) return;
  const show = () => {
    try {
      const tokens = encode(typed(find("prompt").value));
      const edits = touch.edits.filter(
        ({ position }) => position === null || position < tokens.length,
      );
      touch.ask(tokens, edits);
    } catch (error) {
      find("complaint").textContent = error.message;
    }
  };
  if (machine) {
    const [here, there] = machine.demonstration;
    const { length } = machine.states;
    const walk = `${length} states, from each to one of ${machine.successors[0].length}`;
    find("machine").textContent =
      `It reads the digits of a machine that walks between ${walk}. Nobody told it that there ` +
      `are states. Here it has read ${here}, and the codes there are those that it has after ` +
      `${there}: so it goes on as from ${there}.`;
  }
  if (data.steered.length)
    find("machine").textContent = "It writes on, with the codes of a topic forced at every token.";
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
  const buttons = shows.map(([name, prompt, edits]) =>
    button(name, () => touch.ask(encode(prompt), edits())),
  );
  if (buttons.length)
    find("shows").append(machine ? "Demonstration:" : "Make it write about:", ...buttons);
  const [, prompt, edits] = shows[0] ?? ["", data.prompt, () => []];
  touch.ask(encode(prompt), edits());
}

/** A topic's codes, forced wherever the network writes. */
function steering([topic, names]) {
  return [
    topic,
    data.prompt,
    () => names.map((name) => ({ kind: "force", code: codeNamed(name), position: null })),
  ];
}

/** What `sample --force-code` does: a run in one state is made to act as if in another. */
function demonstration() {
  const [here, there] = machine.demonstration;
  const edits = () => [{ kind: "as", text: there, position: machine.digits }];
  return [`in ${here}, act as in ${there}`, here, edits];
}
