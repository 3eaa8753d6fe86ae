/* The page of one code. */

/** Places as contexts, each a link to its sequence. */
function contexts(places) {
  return places.map((place) => {
    const position = place % data.length,
      number = Math.floor(place / data.length);
    const where = `sequence ${number}, position ${position}`;
    const link =
      number < nReadable
        ? make("a", { href: `#read/${number}/${position}`, class: "place" }, where)
        : make("span", { class: "place" }, where);
    return make("div", { class: "context" }, ...context(place, 24, 12), link);
  });
}

/** Codes with how near they are, as a list. */
function neighbours(title, near) {
  if (!near.length) return [];
  const items = near.map(([i, value]) =>
    make(
      "li",
      {},
      make("a", { href: "#" + codes[i].name, class: "mono" }, codes[i].name),
      ` ${about(codes[i])} `,
      make("span", { class: "soft" }, value.toFixed(2)),
    ),
  );
  return [make("div", {}, make("h3", {}, title), make("ul", { class: "plain" }, ...items))];
}

function command(code) {
  const text = `python -m minicode.sample --run ${data.title} --force-code ${code.name}`;
  const copy = button(
    "copy",
    async () => {
      await navigator.clipboard.writeText(text);
      copy.textContent = "copied";
    },
    { class: "small" },
  );
  return make("p", { class: "command" }, make("code", {}, text), " ", copy);
}

function next(code) {
  if (!code.next.length)
    return [
      make(
        "p",
        { class: "soft" },
        "This page has not forced it: on a network of this size, only the best are.",
      ),
    ];
  const rows = code.next.map(([id, forced, free]) => [token(id).trim() || "␣", free, forced]);
  const lift = (i) => `× ${Number(code.next[i][3].toPrecision(3))}`;
  return [
    make(
      "p",
      { class: "soft" },
      "The tokens that forcing it makes more probable, and how many times so: after the " +
        "beginnings of 16 sequences, on average. (0.001 is added to both, so that nothing leads " +
        "that hardly ever comes.)",
    ),
    make(
      "p",
      { class: "keys" },
      make("span", { class: "key free" }, "left alone"),
      make("span", { class: "key forced" }, "when it is forced"),
    ),
    make("div", { class: "next" }, ...pairs(rows, 4, lift)),
  ];
}

function drawCode(code) {
  const fact = (name, value) => make("div", {}, make("dt", {}, name), make("dd", {}, value));
  const i = codes.indexOf(code),
    n = codes.length;
  const to = (other, text, rel) => make("a", { href: "#" + other.name, rel }, text);
  const parts = [
    make(
      "p",
      { class: "steps" },
      make("a", { href: "#" }, "← all codes"),
      to(codes[(i + n - 1) % n], "previous", "prev"),
      to(codes[(i + 1) % n], "next", "next"),
      to(codes[Math.floor(Math.random() * n)], "random", undefined),
    ),
    make("h1", { tabindex: "-1" }, code.name),
    code.fits
      ? make("p", {}, "stands for ", make("strong", {}, code.label))
      : make("p", { class: "soft" }, [meaning(code), nearest(code)].filter(Boolean).join("; ")),
    make(
      "dl",
      { class: "facts" },
      fact("fires", whole(code.count)),
      fact("of positions", percent(data.tokens.length ? code.count / data.tokens.length : 0)),
      fact("precision", share(code.precision)),
      fact("recall", share(code.recall)),
      fact("F1", code.label === null ? "–" : share(code.f1)),
    ),
  ];
  if (code.count) {
    if (network)
      parts.push(
        make(
          "p",
          {},
          button("Touch it: force it in the prompt", () => forceInPrompt(code)),
        ),
      );
    parts.push(make("h2", {}, "Where it fires"), ...contexts(code.places));
    if (code.misses.length)
      parts.push(make("h3", {}, `${code.label}, but it does not fire`), ...contexts(code.misses));
    if (code.falseAlarms.length)
      parts.push(
        make("h3", {}, `It fires, but it is not ${code.label}`),
        ...contexts(code.falseAlarms),
      );
    parts.push(make("h2", {}, "What it does"), ...next(code), command(code));
    const near = [
      ...neighbours("Nearest by cosine, at its place", code.near),
      ...neighbours("Most often there when it is (intersection over union)", code.together),
    ];
    if (near.length)
      parts.push(make("h2", {}, "Codes near it"), make("div", { class: "result" }, ...near));
  }
  find("code").replaceChildren(...parts);
}

/** In the prompt as it stands, wherever the network writes. */
function forceInPrompt(code) {
  location.hash = "#touch";
  touch.edit({ kind: "force", code, position: null });
}
