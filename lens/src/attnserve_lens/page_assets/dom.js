// Small helpers for elements and canvases. Texts are only ever set as text, never as markup.

const $ = (id) => document.getElementById(id);

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

function fillSelect(select, options, chosen) {
  select.replaceChildren(...options.map(([value, text]) => make("option", { value }, text)));
  select.value = chosen;
}

function fillTable(table, headings, rows) {
  const cell = (tag, content, scope) => {
    const { text = content, word = false, meter = null } = typeof content === "object" ? content : {};
    const made = make(tag, { scope, class: word ? "word" : null });
    made.textContent = text;
    if (word) made.title = text;
    if (meter !== null) {
      const bar = make("i");
      bar.style.width = `${100 * Math.min(1, meter)}%`;
      made.append(make("span", { class: "meter", "aria-hidden": "true" }, bar));
    }
    return made;
  };
  const head = make("tr", {}, ...headings.map((each) => cell("th", each, "col")));
  const body = rows.map((row) => make("tr", {}, ...row.map((each, i) => cell(i ? "td" : "th", each, i ? null : "row"))));
  table.replaceChildren(make("thead", {}, head), make("tbody", {}, ...body));
}

// A canvas as large as it is shown, sharp at the screen's own resolution. Sizes in CSS pixels.
function prepare(canvas, height) {
  const ratio = window.devicePixelRatio || 1, width = canvas.clientWidth;
  const tall = height ?? canvas.clientHeight;
  const [w, h] = [Math.round(width * ratio), Math.round(tall * ratio)];
  if (height !== undefined) canvas.style.height = `${height}px`;
  if (canvas.width !== w || canvas.height !== h) [canvas.width, canvas.height] = [w, h];
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, tall);
  context.font = '12px system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif';
  context.direction = "ltr";
  return { context, width, height: tall };
}

// Draw at most once a frame, however often it is asked for.
function oncePerFrame(draw) {
  let waiting = false;
  return () => {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => {
      waiting = false;
      draw();
    });
  };
}

// Text cut to a width.
function fitted(context, text, width) {
  if (context.measureText(text).width <= width) return text;
  const letters = Array.from(text);
  while (letters.length && context.measureText(`${letters.join("")}…`).width > width) letters.pop();
  return `${letters.join("")}…`;
}

// Arrow keys among items of which one is in the tab order. `moves` gives the steps by key name.
function roving(container, moves, changed) {
  container.addEventListener("keydown", (event) => {
    const items = [...container.querySelectorAll("[data-item]")];
    const at = items.indexOf(document.activeElement);
    if (at < 0 || event.ctrlKey || event.altKey || event.metaKey) return;
    let to = null;
    if (event.key in moves) to = at + moves[event.key](event.shiftKey);
    else if (event.key === "Home") to = 0;
    else if (event.key === "End") to = items.length - 1;
    if (to === null) return;
    event.preventDefault();
    focusItem(items, Math.min(items.length - 1, Math.max(0, to)));
    changed(document.activeElement);
  });
}

function focusItem(items, index) {
  items.forEach((item, i) => (item.tabIndex = i === index ? 0 : -1));
  items[index].focus({ preventScroll: true });
  items[index].scrollIntoView({ block: "nearest", inline: "nearest" });
}

function percent(share) {
  return `${(100 * share).toFixed(share < 0.0995 ? 1 : 0)} %`;
}

function weightText(weight) {
  return weight >= 0.0995 ? weight.toFixed(3) : weight >= 0.00095 ? weight.toFixed(4) : weight.toExponential(1);
}

function keysText(count) {
  return count >= 99.5 ? count.toFixed(0) : count.toFixed(1);
}
