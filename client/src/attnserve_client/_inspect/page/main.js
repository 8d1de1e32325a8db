// What is chosen, and who draws it.

const state = {
  map: null, data: null, edges: null, layer: 0, head: 0, query: 0, cross: 0, key: 0,
  active: new Set(), filter: "all", scale: "root", measure: "effective", focus: null, pinned: null,
};
let headColours = [];

// Change what is chosen, and draw what depends on it.
async function setState(changes) {
  const before = { ...state };
  Object.assign(state, changes);
  if (changes.head !== undefined && !changes.active) {
    state.active = new Set(state.head < 0 ? state.map.heads.keys() : [state.head]);
  }
  if (changes.query !== undefined) state.cross = state.query;
  const layerChanged = state.layer !== before.layer || !state.data;
  if (layerChanged) {
    const wanted = state.layer, data = await loadLayer(state.map, wanted);
    if (wanted !== state.layer) return;
    state.data = data;
  }
  const changed = (...names) => names.some((name) => state[name] !== before[name]);
  if (layerChanged || changed("head", "scale", "filter")) {
    buildPicture();
    showBar();
  }
  if (changed("filter")) drawOverview();
  markOverview();
  if (layerChanged || changed("head", "filter", "active")) refreshTokens();
  if (layerChanged || changed("head", "scale", "filter", "query")) {
    drawQuery();
    refreshCross();
    drawSpread();
  }
  if (layerChanged || changed("head")) drawSinks();
  if (layerChanged || changed("head")) $("status").textContent = headName();
}

async function showMap(map) {
  state.map = await loadMap(map);
  Object.assign(state, { data: null, layer: 0, head: 0, active: new Set([0]), filter: "all", focus: null, pinned: null, edges: null });
  const last = map.queries.length - 1;
  state.query = Math.min(last, map.first_query);
  state.cross = state.query;
  state.key = 0;
  // Among many keys every weight is small: against uniform they can still be told apart.
  state.scale = map.keys.length > 64 ? "lift" : "root";
  headColours = Array.from({ length: Math.max(map.heads.length, map.layers.length) }, (_, head) => headColour(head));
  fillSelect($("layer"), map.layers.map((layer, l) => [l, layer]), 0);
  fillSelect($("head"), [...map.heads.map((head, h) => [h, head]), [-1, "mean of heads"]], 0);
  $("filter-field").hidden = map.split === null;
  $("filter").value = "all";
  resetView();
  setUpOverview();
  setUpTokens();
  setUpQuery();
  listAllSinks();
  await setState({});
  loadRest(map);
}

function showSequence(sequence) {
  const { maps } = meta.sequences[sequence];
  fillSelect($("map"), maps.map((map, m) => [m, map.title]), 0);
  $("map-field").hidden = maps.length < 2;
  return showMap(maps[0]);
}

function showBar() {
  $("layer").value = state.layer;
  $("head").value = state.head;
  $("scale").value = state.scale;
  [$("legend-low").textContent, $("legend-high").textContent] = scaleEnds[state.scale];
  const context = $("legend-bar").getContext("2d");
  for (let x = 0; x < 120; x++) {
    context.fillStyle = cssColour(x / 119);
    context.fillRect(x, 0, 1, 10);
  }
}

function redraw() {
  readPalette();
  if (!state.data) return;
  headColours = headColours.map((_, head) => headColour(head));
  buildPicture();
  showBar();
  setUpChips();
  drawOverview();
  refreshTokens();
  drawQuery();
  refreshCross();
  drawSpread();
  drawSinks();
}

function listen() {
  $("bar").addEventListener("submit", (event) => event.preventDefault());
  $("sequence").addEventListener("change", () => showSequence(+$("sequence").value));
  $("map").addEventListener("change", () => showMap(meta.sequences[+$("sequence").value].maps[+$("map").value]));
  $("layer").addEventListener("change", () => setState({ layer: +$("layer").value }));
  $("head").addEventListener("change", () => setState({ head: +$("head").value }));
  $("filter").addEventListener("change", () => setState({ filter: $("filter").value }));
  $("scale").addEventListener("change", () => setState({ scale: $("scale").value }));
  listenOverview();
  listenTokens();
  listenHeatmap();
  listenQuery();
  listenSpread();
  dark.addEventListener("change", redraw);
  window.addEventListener("resize", oncePerFrame(redraw));
}

async function start() {
  readPalette();
  fillSelect($("sequence"), meta.sequences.map((sequence, s) => [s, sequence.name]), 0);
  $("sequence-field").hidden = meta.sequences.length < 2;
  listen();
  await showSequence(0);
  await new Promise(requestAnimationFrame);
  document.documentElement.dataset.ready = String(Math.round(performance.now()));
}

start();
