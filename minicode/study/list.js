/* The list of codes, grouped by what they stand for. */

const GROUPS = 40; // drawn at a time,
const SHOWN = 3; // of each so many codes at first,
const ROWS = 100; // and more when asked for
const ORDERS = {
  f1: (a, b) => Math.round(100 * b.f1) - Math.round(100 * a.f1) || b.count - a.count,
  count: (a, b) => b.count - a.count,
  label: (a, b) => collator.compare(a.label ?? "", b.label ?? "") || ORDERS.f1(a, b),
  name: (a, b) => collator.compare(a.name, b.name),
};
let groups = [],
  drawn = 0;

/** The codes that are asked for, as [[title, [codes]], ...]: in groups, and none fits last. */
function grouped() {
  const words = find("search").value.toLowerCase().split(/\s+/);
  const site = find("site").value,
    least = Number(find("least").value),
    dead = find("dead").checked;
  const asked = codes.filter(
    (code) =>
      (!site || code.row === site) &&
      (code.count ? code.f1 >= least : dead) &&
      words.every((word) => code.text.includes(word)),
  );
  const found = new Map();
  for (const code of asked.sort(ORDERS[find("order").value])) {
    const title = code.fits ? code.label : meaning(code);
    if (!found.has(title)) found.set(title, []);
    found.get(title).push(code);
  }
  const fit = ([, [first]]) => (first.fits ? 0 : first.count ? 1 : 2);
  return [...found].sort((a, b) => fit(a) - fit(b));
}

function drawList() {
  groups = grouped();
  drawn = 0;
  find("list")
    .querySelectorAll("tbody")
    .forEach((body) => body.remove());
  const n = groups.reduce((sum, [, some]) => sum + some.length, 0);
  const beyond = data.left_out
    ? `; ${whole(data.left_out)} more, whose labels fit less, are left out of this page`
    : "";
  find("found").textContent =
    `${whole(n)} of ${whole(codes.length)} codes, ${whole(groups.length)} groups${beyond}`;
  drawMore();
}

/** The next groups, of each the first codes. */
function drawMore() {
  for (const [title, some] of groups.slice(drawn, drawn + GROUPS)) {
    const body = make(
      "tbody",
      {},
      make("tr", { class: "group" }, make("th", { scope: "rowgroup", colspan: 6 }, title)),
    );
    find("list").append(body);
    drawGroup(body, some, SHOWN);
  }
  drawn += GROUPS;
  find("more").hidden = drawn >= groups.length;
}

/** n more codes of a group, and a button for those after them. */
function drawGroup(body, some, n) {
  const start = body.rows.length - 1;
  body.append(...some.slice(start, start + n).map(row));
  const left = some.length - start - n;
  if (left <= 0) return;
  const rest = make(
    "tr",
    {},
    make(
      "td",
      { colspan: 6 },
      button(
        `${whole(left)} more`,
        () => {
          rest.remove();
          drawGroup(body, some, ROWS);
          body.rows[start + n + 1].querySelector("a").focus();
        },
        { class: "small", "aria-label": `${whole(left)} more of this group` },
      ),
    ),
  );
  body.append(rest);
}

function row(code) {
  const number = (text) => make("td", { class: "number" }, text);
  const snippet = code.places.length
    ? context(code.places[Math.floor(code.places.length / 2)], 12, 6)
    : [];
  const other = nearest(code);
  return make(
    "tr",
    {},
    make("td", {}, make("a", { href: "#" + code.name, class: "mono" }, code.name)),
    make(
      "td",
      { class: "snippet" },
      make("div", {}, ...snippet),
      other && make("div", { class: "soft" }, other),
    ),
    number(whole(code.count)),
    number(share(code.precision)),
    number(share(code.recall)),
    number(code.label === null ? "–" : share(code.f1)),
  );
}

function startList() {
  const sites = [...new Set(codes.map((code) => code.row))].sort(collator.compare);
  find("site").append(...sites.map((site) => make("option", { value: site }, site)));
  for (const id of ["search", "least"]) find(id).oninput = drawList;
  for (const id of ["site", "order", "dead"]) find(id).onchange = drawList;
  find("more").onclick = drawMore;
  drawList();
}
