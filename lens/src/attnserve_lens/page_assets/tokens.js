// Token to token: lines between two lists, heads switched on and off, one token looked at alone.

const ROW = 22, PADDING = 4, EDGES = 1500, STRIP = 9;

function setUpTokens() {
  const { map } = state;
  const list = (name, tokens) => {
    const items = tokens.map((token, index) => {
      const item = make("li", { role: "option", "data-item": "", tabindex: index ? -1 : 0, "aria-selected": "false", dir: "auto" });
      item.textContent = token;
      item.dataset.index = index;
      item.setAttribute("aria-label", `${name} ${index}: ${token}`);
      return item;
    });
    $(name === "query" ? "queries" : "keys").replaceChildren(...items);
  };
  list("query", map.queries);
  list("key", map.keys);
  setUpChips();
}

function setUpChips() {
  const { map } = state;
  const action = (text, heads) => {
    const button = make("button", { type: "button" }, text);
    button.addEventListener("click", () => setState({ active: new Set(heads()) }));
    return button;
  };
  const all = map.heads.map((_, h) => h);
  $("chips").replaceChildren(
    ...all.map((h) => {
      const swatch = make("span", { class: "swatch", "aria-hidden": "true" });
      swatch.style.background = headColour(h);
      const chip = make("button", { type: "button", "aria-pressed": "false", title: "Double-click: this head alone" }, swatch, `head ${map.heads[h]}`);
      chip.dataset.head = h;
      chip.addEventListener("click", () => {
        const active = new Set(state.active);
        if (!active.delete(h)) active.add(h);
        setState({ active });
      });
      chip.addEventListener("dblclick", () => setState({ active: new Set([h]), head: h }));
      return chip;
    }),
    action("All", () => all), action("None", () => []), action("Only the chosen head", () => (state.head < 0 ? all : [state.head])),
  );
}

function markTokens() {
  for (const chip of $("chips").querySelectorAll("[data-head]")) {
    chip.setAttribute("aria-pressed", state.active.has(+chip.dataset.head));
  }
  const { map, filter } = state, focus = state.focus ?? state.pinned;
  for (const side of ["queries", "keys"]) {
    for (const item of $(side).children) {
      const index = +item.dataset.index, mine = focus && focus.side === side && focus.index === index;
      item.setAttribute("aria-selected", Boolean(state.pinned && state.pinned.side === side && state.pinned.index === index));
      item.classList.toggle("focus", Boolean(mine));
      item.classList.toggle("filtered", filter !== "all" && map.split !== null &&
        (index < map.split ? "a" : "b") !== filter[side === "queries" ? 0 : 1]);
    }
  }
}

// The weights that are drawn, as [weight, head, query, key], heaviest first.
function edgesShown(layer) {
  const { map, filter } = state, focus = state.focus ?? state.pinned;
  if (!focus) {
    const edges = [...state.active].flatMap((head) => layer.heaviestEdges(head, filter, EDGES));
    edges.sort((a, b) => b[0] - a[0]);
    return edges.slice(0, EDGES);
  }
  const edges = [];
  const others = focus.side === "queries" ? map.keys.length : map.queries.length;
  for (const head of state.active) {
    for (let other = 0; other < others; other++) {
      const [q, k] = focus.side === "queries" ? [focus.index, other] : [other, focus.index];
      const weight = layer.weight(head, q, k);
      if (weight > 0 && within(map, filter, q, k)) edges.push([weight, head, q, k]);
    }
  }
  return edges.sort((a, b) => b[0] - a[0]);
}

function drawTokens() {
  const layer = state.data;
  if (!layer) return;
  const box = $("lines-scroll"), scroll = box.scrollTop;
  const tall = Math.min(box.clientHeight, Math.max($("queries").offsetHeight, $("keys").offsetHeight));
  const { context, width, height } = prepare($("lines-canvas"), tall);
  const focus = state.focus ?? state.pinned;
  const active = [...state.active].sort((a, b) => a - b);
  const strip = focus ? active.length * STRIP + 6 : 0;
  const left = focus && focus.side === "keys" ? strip : 2, right = width - (focus && focus.side === "queries" ? strip : 2);
  const y = (index) => PADDING + index * ROW + ROW / 2 - scroll;
  const edges = state.edges ?? (state.edges = edgesShown(layer));
  for (let i = edges.length - 1; i >= 0; i--) {
    const [weight, head, q, k] = edges[i], from = y(q), to = y(k);
    if ((from < 0 || from > height) && (to < 0 || to > height)) continue;
    const t = Math.sqrt(weight);
    if (t < 0.02) continue;
    context.globalAlpha = Math.min(1, 0.06 + 0.94 * t);
    context.strokeStyle = headColours[head];
    context.lineWidth = 0.6 + 3 * t;
    context.beginPath();
    context.moveTo(left, from);
    context.bezierCurveTo(left + (right - left) / 3, from, right - (right - left) / 3, to, right, to);
    context.stroke();
  }
  context.globalAlpha = 1;
  if (focus) drawStrips(context, width, height, edges, active, focus, y);
}

// Beside each token at the other end: one block a head, in the order of the heads.
function drawStrips(context, width, height, edges, active, focus, y) {
  const column = new Map(active.map((head, i) => [head, i]));
  const toKeys = focus.side === "queries", start = toKeys ? width - active.length * STRIP - 2 : 2;
  context.strokeStyle = palette.line;
  context.lineWidth = 1;
  context.strokeRect(start - 1.5, -1, active.length * STRIP + 2, height + 2);
  for (const [weight, head, q, k] of edges) {
    const at = y(toKeys ? k : q);
    if (at < -ROW || at > height + ROW) continue;
    const tall = Math.max(1, (ROW - 4) * Math.sqrt(weight));
    context.fillStyle = headColours[head];
    context.fillRect(start + column.get(head) * STRIP, at - tall / 2, STRIP - 2, tall);
  }
}

function describeTokens() {
  const { map } = state, focus = state.focus ?? state.pinned, edges = state.edges ?? [];
  let text;
  if (!state.active.size) text = "No head is switched on.";
  else if (!focus) {
    const least = edges.length ? edges[edges.length - 1][0] : 0;
    const total = state.active.size * map.queries.length * map.keys.length;
    text = `${state.active.size === 1 ? "Head" : "Heads"} ${headList()} of layer ${map.layers[state.layer]}: ` + (edges.length < EDGES
      ? `all ${edges.length} weights above 0.` : `the ${EDGES} heaviest of ${total} weights, down to ${weightText(least)}.`);
  } else {
    const toKeys = focus.side === "queries", token = map[focus.side][focus.index];
    const best = edges.slice(0, 6).map(([weight, head, q, k]) =>
      `${toKeys ? map.keys[k] : map.queries[q]} (${toKeys ? k : q}) ${weightText(weight)} in head ${map.heads[head]}`);
    text = `${toKeys ? "Query" : "Key"} ${focus.index} “${token}” ${toKeys ? "attends to" : "is attended to by"}: ${best.join("; ") || "nothing here"}.`;
  }
  $("lines-caption").textContent = text;
  $("lines-canvas").setAttribute("aria-label", `Lines between queries and keys of layer ${map.layers[state.layer]}`);
}

function headList() {
  const { map } = state;
  if (state.active.size === map.heads.length) return "all";
  return [...state.active].sort((a, b) => a - b).map((h) => map.heads[h]).join(", ");
}

function refreshTokens() {
  state.edges = null;
  markTokens();
  drawTokens();
  describeTokens();
}

function listenTokens() {
  $("lines-scroll").addEventListener("scroll", oncePerFrame(drawTokens), { passive: true });
  for (const side of ["queries", "keys"]) {
    const list = $(side);
    const look = (item) => {
      const focus = item ? { side, index: +item.dataset.index } : null;
      if (focus?.side === state.focus?.side && focus?.index === state.focus?.index) return;
      state.focus = focus;
      invalidate("tokens");
    };
    list.addEventListener("pointermove", (event) => look(event.target.closest("[data-item]")));
    list.addEventListener("pointerleave", () => look(null));
    list.addEventListener("focusin", (event) => look(event.target.closest("[data-item]")));
    list.addEventListener("focusout", () => look(null));
    const pin = (item) => {
      if (!item) return;
      const index = +item.dataset.index, same = state.pinned?.side === side && state.pinned.index === index;
      state.pinned = same ? null : { side, index };
      if (side === "queries" && !same) setState({ query: index });
      invalidate("tokens");
    };
    list.addEventListener("click", (event) => pin(event.target.closest("[data-item]")));
    list.addEventListener("keydown", (event) => {
      if (event.key === "Enter" || event.key === " ") {
        event.preventDefault();
        pin(event.target.closest("[data-item]"));
      } else if (event.key === "ArrowLeft" || event.key === "ArrowRight") {
        event.preventDefault();
        const other = $(event.key === "ArrowLeft" ? "queries" : "keys"), items = [...other.children];
        focusItem(items, Math.min(items.length - 1, +event.target.dataset.index));
      }
    });
    roving(list, { ArrowUp: (far) => (far ? -10 : -1), ArrowDown: (far) => (far ? 10 : 1), PageUp: () => -20, PageDown: () => 20 }, () => {});
  }
}
