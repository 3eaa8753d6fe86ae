/* What is shown, by the address: #mlp.1.527 a code, #read/3/12 a place of a sequence, or a part
   of the page. */

// The page as it was left for a code: how far it was scrolled, and the link that was followed.
let left = { top: 0 };
history.scrollRestoration = "manual";

function show() {
  const hash = decodeURIComponent(location.hash.slice(1));
  const code = byName.get(hash);
  const [, number, position] = /^read\/(\d+)\/(\d+)$/.exec(hash) ?? [];
  if (code && find("code").hidden) left = { top: window.scrollY, link: document.activeElement };
  find("run").hidden = Boolean(code);
  find("code").hidden = !code;
  document.title = (code ? code.name + " · " : "") + data.title + " · minicode";
  light();
  if (code) {
    drawCode(code);
    window.scrollTo(0, 0);
    return find("code").querySelector("h1").focus({ preventScroll: true });
  }
  if (number) readSequence(Number(number), Number(position));
  const part = number ? find("read") : hash && find("run").querySelector("#" + CSS.escape(hash));
  if (part) return part.scrollIntoView();
  window.scrollTo(0, left.top);
  left.link?.focus({ preventScroll: true });
}

/** Keys on the page of a code: back to the list, or to the codes beside it. */
function press(event) {
  if (find("code").hidden || event.target.closest?.("input, select")) return;
  const links = { ArrowLeft: "prev", ArrowRight: "next" };
  if (event.key === "Escape") location.hash = "";
  else if (links[event.key]) find("code").querySelector(`[rel=${links[event.key]}]`).click();
}

function drawMeasures() {
  const measure = (value) =>
    typeof value === "string" ? value : Number.isInteger(value) ? whole(value) : share(value, 3);
  for (const [name, value, note] of data.measures) {
    find("measures").tBodies[0].append(
      make(
        "tr",
        {},
        make("th", { scope: "row" }, name),
        make("td", { class: "number" }, measure(value)),
        make("td", {}, note ?? ""),
      ),
    );
  }
  for (const { svg, caption } of data.figures) {
    const figure = make("figure");
    figure.innerHTML = svg; // made by study/figures.py, which escapes its labels
    figure.prepend(make("h3", {}, figure.querySelector("title").textContent));
    figure.append(make("figcaption", {}, caption));
    find("figures").append(figure);
  }
}

find("run").querySelector("h1").textContent = find("home").textContent = data.title;
find("about").textContent = data.about;
document.body.classList.add(machine ? "machine" : "text");
document.querySelector('nav [href="#touch"]').hidden = !network;
document.querySelector('nav [href="#read"]').hidden = !nReadable;
drawMeasures();
startList();
startTouching();
startReading();
window.onhashchange = show;
document.onkeydown = press;
show();
