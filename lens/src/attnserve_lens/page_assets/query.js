// One query: the text shaded by its weights, its keys in order, and the same query in every head.

function setUpQuery() {
  const { map } = state;
  const spans = map.keys.map((token, index) => {
    const span = make("span", { dir: "auto", "aria-selected": "false" });
    span.textContent = token;
    span.dataset.index = index;
    if (map.square && index !== map.sink) {
      span.setAttribute("role", "option");
      span.setAttribute("data-item", "");
      span.tabIndex = -1;
    }
    return span;
  });
  const parts = [];
  if (!map.square) {
    // The queries are other tokens than the keys that are shaded: they get a line of their own.
    parts.push(...map.queries.map((token, index) => {
      const span = make("span", { role: "option", "data-item": "", tabindex: "-1", dir: "auto", "aria-selected": "false", class: "query" });
      span.textContent = token;
      span.dataset.index = index;
      return span;
    }), make("hr"));
  }
  $("text").replaceChildren(...parts, ...spans);
}

function drawQuery() {
  const { map, data, query } = state;
  if (!data) return;
  const row = data.row(state.head, query, new Float32Array(map.keys.length));
  for (let k = 0; k < row.length; k++) if (!within(map, state.filter, query, k)) row[k] = 0;
  const order = Array.from(row.keys()).filter((k) => row[k] > 0).sort((a, b) => row[b] - row[a] || a - b);
  shadeText(row, order);
  listTop(row, order);
  listHeads();
}

function shadeText(row, order) {
  const { map } = state, visible = visibleOf(map, state.layer)[state.query];
  const ranks = new Map(order.slice(0, 9).map((key, i) => [key, i + 1]));
  const heaviest = order.length ? row[order[0]] : 0;
  for (const span of $("text").querySelectorAll("span")) {
    const index = +span.dataset.index, isQuery = span.hasAttribute("data-item");
    if (isQuery) {
      const chosen = index === state.query;
      span.setAttribute("aria-selected", chosen);
      span.tabIndex = chosen ? 0 : -1;
    }
    if (span.classList.contains("query")) continue;
    const t = intensity(state.scale, row[index], heaviest, visible), code = Math.round(255 * t);
    if (span.dataset.code !== String(code)) {
      span.dataset.code = code;
      span.style.background = code ? cssColour(t) : "";
      span.style.color = code ? textOn(t) : "";
    }
    const rank = ranks.get(index);
    if (span.childElementCount) span.lastElementChild.remove();
    if (rank) span.append(make("sup", {}, String(rank)));
    const said = rank ? `, rank ${rank}, weight ${weightText(row[index])}` : "";
    span.setAttribute("aria-label", `${index}: ${map.keys[index]}${said}`);
  }
}

function listTop(row, order) {
  const { map, query } = state, heaviest = order.length ? row[order[0]] : 1;
  $("top-title").textContent = `Query ${query} “${map.queries[query]}” in ${headName()}`;
  let sum = 0;
  const rows = order.slice(0, +$("top").value).map((key, i) => {
    sum += row[key];
    return [String(i + 1), { text: map.keys[key], word: true }, String(key), map.square && key !== map.sink ? String(key - query) : "–",
      weightText(row[key]), { text: "", meter: row[key] / heaviest }, sum.toFixed(3), Math.log(row[key] / heaviest).toFixed(2)];
  });
  fillTable($("top-table"), ["rank", { text: "key", word: true }, "position", "distance", "weight", "", "sum", "score"], rows);
}

function listHeads() {
  const { map, data, query } = state, row = new Float32Array(map.keys.length);
  $("heads-title").textContent = `The same query in every head of layer ${map.layers[state.layer]}`;
  const rows = map.heads.map((head, h) => {
    data.row(h, query, row);
    let best = 0;
    for (let k = 1; k < row.length; k++) if (row[k] > row[best]) best = k;
    return [String(head), keysText(effectiveOf(map, state.layer, h)[query]), { text: map.keys[best], word: true }, String(best), weightText(row[best])];
  });
  fillTable($("heads-table"), ["head", "effective keys", { text: "heaviest key", word: true }, "position", "weight"], rows);
}

function listenQuery() {
  const choose = (item) => item && setState({ query: +item.dataset.index });
  $("text").addEventListener("click", (event) => choose(event.target.closest("[data-item]")));
  roving($("text"), { ArrowLeft: () => -1, ArrowRight: () => 1, ArrowUp: () => -10, ArrowDown: () => 10 }, choose);
  $("top").addEventListener("change", drawQuery);
}
