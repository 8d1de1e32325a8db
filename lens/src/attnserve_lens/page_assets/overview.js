// Layers by heads: a picture of each, and a number.

const measures = {
  effective: ["effective keys, mean over queries", keysText],
  first: ["weight on the first key", percent],
  special: ["weight on the model's own tokens", percent],
  own: ["weight on the token itself", percent],
  previous: ["weight on the token before", percent],
  following: ["weight on the token after", percent],
};

function setUpOverview() {
  const numbers = state.map.measures;
  const usable = Object.keys(measures).filter((name) => numbers[name] && (name !== "special" || state.map.special.length));
  if (!usable.includes(state.measure)) state.measure = usable[0];
  fillSelect($("measure"), usable.map((name) => [name, measures[name][0]]), state.measure);
  const { layers, heads } = state.map;
  const rows = layers.map((layer, l) =>
    make("tr", { role: "row" },
      make("th", { role: "rowheader", scope: "row" }, `layer ${layer}`),
      ...heads.map((head, h) => {
        const cell = make("td", { role: "gridcell", "data-item": "", tabindex: "-1" });
        cell.append(make("canvas", { "aria-hidden": "true" }), make("span", { class: "number" }));
        [cell.dataset.layer, cell.dataset.head] = [l, h];
        return cell;
      })));
  const head = make("tr", { role: "row" }, make("td", {}), ...heads.map((each) => make("th", { role: "columnheader", scope: "col" }, `head ${each}`)));
  $("grid").style.setProperty("--heads", heads.length);
  $("grid").replaceChildren(make("thead", { role: "rowgroup" }, head), make("tbody", { role: "rowgroup" }, ...rows));
  drawOverview();
}

function drawOverview() {
  const { map } = state;
  const [, format] = measures[state.measure];
  for (const cell of $("grid").querySelectorAll("[data-item]")) {
    const [l, h] = [+cell.dataset.layer, +cell.dataset.head];
    const numbers = map.measures[state.measure][l]; // none of a layer that is not loaded yet
    const number = numbers ? format(numbers[h]) : "…";
    cell.querySelector(".number").textContent = number;
    cell.setAttribute("aria-label", `layer ${map.layers[l]}, head ${map.heads[h]}: ${number} ${measures[state.measure][0]}`);
    drawThumbnail(cell.querySelector("canvas"), l, h);
  }
  markOverview();
}

function drawThumbnail(canvas, layer, head) {
  const { map } = state;
  const [height, width] = map.thumbnail;
  if (canvas.width !== width || canvas.height !== height) [canvas.width, canvas.height] = [width, height];
  const context = canvas.getContext("2d"), image = context.createImageData(width, height);
  const pixels = new Uint32Array(image.data.buffer);
  const start = (layer * map.heads.length + head) * width * height;
  for (let i = 0; i < pixels.length; i++) {
    const query = (Math.floor(i / width) * map.queries.length) / height;
    const key = ((i % width) * map.keys.length) / width;
    const code = within(map, state.filter, query, key) ? map.thumbnails[start + i] : 0;
    pixels[i] = palette.scale32[code];
  }
  context.putImageData(image, 0, 0);
}

function markOverview() {
  for (const cell of $("grid").querySelectorAll("[data-item]")) {
    const chosen = +cell.dataset.layer === state.layer && (+cell.dataset.head === state.head || (state.head < 0 && cell.dataset.head === "0"));
    cell.setAttribute("aria-selected", chosen && state.head >= 0);
    cell.tabIndex = chosen ? 0 : -1;
  }
}

function listenOverview() {
  const width = () => state.map.heads.length;
  roving($("grid"), {
    ArrowLeft: () => -1, ArrowRight: () => 1, ArrowUp: () => -width(), ArrowDown: () => width(),
  }, () => {});
  const choose = (cell) => cell && setState({ layer: +cell.dataset.layer, head: +cell.dataset.head });
  $("grid").addEventListener("click", (event) => choose(event.target.closest("[data-item]")));
  $("grid").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" && event.key !== " ") return;
    event.preventDefault();
    choose(event.target.closest("[data-item]"));
  });
  $("measure").addEventListener("change", () => {
    state.measure = $("measure").value;
    drawOverview();
  });
}
