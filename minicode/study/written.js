/* What the network writes on, left alone and with edits, side by side. */

const N_WRITTEN = machine ? 8 : 4; // continuations

/** One continuation at a time, so that the page stays quick. */
function showWritten(free, forced, edits) {
  const last = touch.tokens.length - 1;
  const as = touch.edits.find((edit) => edit.kind === "as" && !edit.row && edit.position === last);
  const own = machine && statesIn(touch.tokens).at(-1);
  const sides = [
    { name: "left alone", kind: "free", from: free, how: { resolved: [], others: [] }, state: own },
    {
      name: "with your codes",
      kind: "forced",
      from: forced,
      how: edits,
      state: as ? statesIn(encode(as.text)).at(-1) : own,
    },
  ].slice(0, touch.edits.length ? 2 : 1);
  for (const side of sides) {
    side.list = make(
      "ol",
      {},
      ...Array.from({ length: N_WRITTEN }, () => make("li", {}, "\u00a0")),
    );
    side.about = make("p", { class: "soft" }, machine ? follow(side.state) : "");
    side.sum = make("p", { class: "soft" }, machine ? "\u00a0" : "");
    side.texts = [];
  }
  const parts = sides.map(({ name, kind, list, about, sum }) => [
    make("span", { class: `key ${kind}` }, name),
    about,
    list,
    sum,
  ]);
  find("written").replaceChildren(...parts.map((some) => make("div", {}, ...some)));
  let number = 0;
  const next = () => {
    const side = sides[number % sides.length],
      i = Math.floor(number / sides.length);
    if (!side.list.isConnected) return;
    if (i === N_WRITTEN)
      return (
        machine &&
        sides.forEach((side) => {
          side.sum.textContent = count(side, sides);
        })
      );
    const tokens = goOn(
      side.from,
      side.how,
      machine ? 5 * machine.digits : 32,
      chance(1000 * touch.seed + i),
    );
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
  const states = [...new Set(sides.map(({ state }) => state))].filter(
    (state) => successors(state).length,
  );
  const follows = (state) => firsts.filter((first) => successors(state).includes(first)).length;
  return states
    .map((state) => `${follows(state)} of ${firsts.length} may follow ${state}`)
    .join(", ");
}

/** Tokens that were written. On the machine the state is shown that the first one should follow. */
function written(tokens, state) {
  if (!machine) return [visible(decode([SEPARATOR, ...tokens]))];
  return writtenStates(tokens).flatMap((name, i, all) => {
    if (i === 0) return [make("span", { class: "soft" }, name)];
    const before = i === 1 ? state : all[i - 1];
    const astray = name.length === machine.digits && !successors(before).includes(name);
    const look = astray
      ? { class: "astray", title: `${name} may not follow ${before}` }
      : { class: i === 1 ? "first" : "" };
    return [" → ", make("span", look, name)];
  });
}
