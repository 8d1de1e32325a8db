// The map of one head: every query against every key, with a cross, zoom, pan and a small chart of
// where the zoomed part lies.

const view = { first: [0, 0], cells: 0, picture: null };
const EDGE = 92, LEAST_LABEL = 11;

function resetView() {
  const { map } = state;
  view.first = [0, 0];
  view.cells = Math.max(map.queries.length, map.keys.length);
}

function buildPicture() {
  const { map, data, scale } = state;
  const [rows, columns] = [map.queries.length, map.keys.length];
  const picture = document.createElement("canvas");
  view.picture = picture;
  [picture.width, picture.height] = [columns, rows];
  const context = picture.getContext("2d"), image = context.createImageData(columns, rows);
  const pixels = new Uint32Array(image.data.buffer), row = new Float32Array(columns);
  const visible = visibleOf(map, state.layer), whole = map.split === null || state.filter === "all";
  for (let q = 0; q < rows; q++) {
    data.row(state.head, q, row);
    let heaviest = 0;
    for (let k = 0; k < columns; k++) heaviest = Math.max(heaviest, row[k]);
    for (let k = 0; k < columns; k++) {
      const t = whole || within(map, state.filter, q, k) ? intensity(scale, row[k], heaviest, visible[q]) : 0;
      pixels[q * columns + k] = palette.scale32[(255 * t + 0.5) | 0];
    }
  }
  context.putImageData(image, 0, 0);
}

function layout(width) {
  const { map } = state;
  const labelled = Math.min(width - EDGE, 640) / view.cells >= LEAST_LABEL;
  const edge = labelled ? EDGE : 34;
  const side = Math.max(60, Math.min(width - edge - 2, 640));
  const [rows, columns] = [Math.min(view.cells, map.queries.length), Math.min(view.cells, map.keys.length)];
  const cell = side / view.cells;
  return { labelled, edge, cell, rows, columns, width: cell * columns, height: cell * rows };
}

function drawHeatmap() {
  const { map, data } = state;
  if (!data) return;
  if (!view.picture) buildPicture();
  const canvas = $("heatmap"), box = layout(canvas.clientWidth);
  const { context } = prepare(canvas, Math.ceil(box.edge + box.height + 3));
  const [q0, k0] = view.first;
  context.imageSmoothingEnabled = box.cell < 1;
  context.drawImage(view.picture, k0, q0, box.columns, box.rows, box.edge, box.edge, box.width, box.height);
  context.strokeStyle = palette.control;
  context.strokeRect(box.edge - 0.5, box.edge - 0.5, box.width + 1, box.height + 1);
  drawSplit(context, box, q0, k0);
  drawDocuments(context, box, q0, k0);
  drawLabels(context, box, q0, k0);
  drawCross(context, box, q0, k0);
  if (box.rows < map.queries.length || box.columns < map.keys.length) drawWhere(context, canvas.clientWidth, box);
  canvas.setAttribute("aria-label", `Weights of ${headName()}, ${map.queries.length} queries by ${map.keys.length} keys; arrow keys read them`);
}

function drawSplit(context, box, q0, k0) {
  if (state.map.split === null) return;
  context.setLineDash([5, 4]);
  context.strokeStyle = palette.ink;
  context.beginPath();
  const x = box.edge + (state.map.split - k0) * box.cell, y = box.edge + (state.map.split - q0) * box.cell;
  if (x > box.edge && x < box.edge + box.width) context.rect(x, box.edge, 0, box.height);
  if (y > box.edge && y < box.edge + box.height) context.rect(box.edge, y, box.width, 0);
  context.stroke();
  context.setLineDash([]);
}

// Of documents that were packed into one row, each one's queries and keys: the first and the last.
function documentsOf(map) {
  const ends = [map.queries.length, map.keys.length - (map.sink === null ? 0 : 1)];
  return map.documents.map((first, d) => [first, map.documents[d + 1] ?? ends]);
}

// A frame around each document: no query sees a key outside of its own.
function drawDocuments(context, box, q0, k0) {
  if (state.map.documents.length < 2) return;
  context.save();
  context.beginPath();
  context.rect(box.edge, box.edge, box.width, box.height);
  context.clip();
  context.strokeStyle = palette.ink;
  context.lineWidth = 1;
  for (const [[q, k], [lastQ, lastK]] of documentsOf(state.map)) {
    const [x, y] = [box.edge + (k - k0) * box.cell, box.edge + (q - q0) * box.cell];
    context.strokeRect(x, y, (lastK - k) * box.cell, (lastQ - q) * box.cell);
  }
  context.restore();
}

// Zooms to one document, or to all.
function showDocument(number) {
  const { map } = state;
  if (number < 0) return zoom(null);
  const [first, last] = documentsOf(map)[number];
  view.cells = Math.max(last[0] - first[0], last[1] - first[1], 1);
  placeView(...first);
  moveCross(...first);
}

function drawLabels(context, box, q0, k0) {
  const { map } = state;
  const size = Math.min(12, Math.max(9, box.cell - 1));
  context.font = context.font.replace(/^\d+(\.\d+)?px/, `${size}px`);
  context.fillStyle = palette.ink;
  context.textBaseline = "middle";
  // Between labels at least a line's height; positions where tokens do not fit.
  const step = box.labelled ? 1 : niceStep(view.cells);
  const name = (tokens, index) => (box.labelled ? fitted(context, tokens[index], box.edge - 8) : String(index));
  context.textAlign = "right";
  for (let q = Math.ceil(q0 / step) * step; q < q0 + box.rows; q += step) {
    context.fillText(name(map.queries, q), box.edge - 5, box.edge + (q - q0 + 0.5) * box.cell);
  }
  for (let k = Math.ceil(k0 / step) * step; k < k0 + box.columns; k += step) {
    context.save();
    context.translate(box.edge + (k - k0 + 0.5) * box.cell, box.edge - 5);
    context.rotate(-Math.PI / 2);
    context.textAlign = "left";
    context.fillText(name(map.keys, k), 0, 0);
    context.restore();
  }
}

function niceStep(count) {
  const rough = count / 8;
  const power = 10 ** Math.floor(Math.log10(Math.max(1, rough)));
  return Math.max(1, [1, 2, 5, 10].find((each) => each * power >= rough) * power);
}

function drawCross(context, box, q0, k0) {
  const [x, y] = [box.edge + (state.key - k0) * box.cell, box.edge + (state.cross - q0) * box.cell];
  const size = Math.max(box.cell, 5), shift = (box.cell - size) / 2;
  context.save();
  context.beginPath();
  context.rect(box.edge, box.edge, box.width, box.height);
  context.clip();
  for (const [width, colour] of [[3.5, palette.paper], [1.5, palette.mark]]) {
    context.lineWidth = width;
    context.strokeStyle = colour;
    context.strokeRect(x + shift, y + shift, size, size);
    context.beginPath();
    context.moveTo(box.edge, y + box.cell / 2);
    context.lineTo(x + shift, y + box.cell / 2);
    context.moveTo(x + box.cell / 2, box.edge);
    context.lineTo(x + box.cell / 2, y + shift);
    context.stroke();
  }
  context.restore();
}

// The whole map in small, with a frame around the part that is shown.
function drawWhere(context, width, box) {
  const { map } = state, size = 96, unit = size / Math.max(map.queries.length, map.keys.length);
  const room = width - (box.edge + box.width);
  if (room < size + 16) return;
  const [x, y] = [box.edge + box.width + 14, box.edge];
  context.imageSmoothingEnabled = true;
  context.drawImage(view.picture, x, y, map.keys.length * unit, map.queries.length * unit);
  context.lineWidth = 1;
  context.strokeStyle = palette.control;
  context.strokeRect(x, y, map.keys.length * unit, map.queries.length * unit);
  context.lineWidth = 2;
  context.strokeStyle = palette.mark;
  context.strokeRect(x + view.first[1] * unit, y + view.first[0] * unit, box.columns * unit, box.rows * unit);
}

function describeHeatmap() {
  const { map, data, cross, key } = state;
  if (!data) return;
  const row = data.row(state.head, cross, new Float32Array(map.keys.length));
  const rank = row.reduce((before, weight) => before + (weight > row[key]), 1);
  $("map-readout").textContent = `${headName()}: query ${cross} “${map.queries[cross]}” → key ${key} “${map.keys[key]}”: ` +
    `${weightText(row[key])}, rank ${rank} of ${map.keys.length} in its row`;
}

function headName() {
  const { map } = state;
  return `layer ${map.layers[state.layer]}, ${state.head < 0 ? "mean of heads" : `head ${map.heads[state.head]}`}`;
}

function refreshMap() {
  drawHeatmap();
  describeHeatmap();
}

const refreshCross = oncePerFrame(refreshMap);

function moveCross(query, key) {
  const { map } = state, limit = (value, count) => Math.min(count - 1, Math.max(0, value));
  state.cross = limit(query, map.queries.length);
  state.key = limit(key, map.keys.length);
  const into = (first, at) => (at < first ? at : at >= first + view.cells ? at - view.cells + 1 : first);
  view.first = [into(view.first[0], state.cross), into(view.first[1], state.key)];
  refreshCross();
}

function zoom(factor) {
  $("document").value = -1;
  const { map } = state, most = Math.max(map.queries.length, map.keys.length);
  view.cells = factor === null ? most : Math.min(most, Math.max(Math.min(8, most), Math.round(view.cells * factor)));
  placeView(state.cross - view.cells / 2, state.key - view.cells / 2);
}

function placeView(query, key) {
  const { map } = state;
  const fit = (at, count) => Math.max(0, Math.min(count - Math.min(view.cells, count), Math.round(at)));
  view.first = [fit(query, map.queries.length), fit(key, map.keys.length)];
  refreshCross();
}

function listenHeatmap() {
  const canvas = $("heatmap");
  $("zoom-in").addEventListener("click", () => zoom(0.5));
  $("zoom-out").addEventListener("click", () => zoom(2));
  $("zoom-all").addEventListener("click", () => zoom(null));
  $("document").addEventListener("change", () => showDocument(+$("document").value));
  canvas.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.altKey || event.metaKey) return;
    const far = event.shiftKey ? 10 : 1;
    const moves = { ArrowUp: [-far, 0], ArrowDown: [far, 0], ArrowLeft: [0, -far], ArrowRight: [0, far] };
    if (moves[event.key]) moveCross(state.cross + moves[event.key][0], state.key + moves[event.key][1]);
    else if (event.key === "+" || event.key === "=") zoom(0.5);
    else if (event.key === "-") zoom(2);
    else if (event.key === "0") zoom(null);
    else if (event.key === "Home") moveCross(state.cross, 0);
    else if (event.key === "End") moveCross(state.cross, state.map.keys.length - 1);
    else if (event.key === "Enter") setState({ query: state.cross });
    else return;
    event.preventDefault();
  });
  const cellAt = (event) => {
    const box = layout(canvas.clientWidth), place = canvas.getBoundingClientRect();
    const [x, y] = [event.clientX - place.left - box.edge, event.clientY - place.top - box.edge];
    if (x < 0 || y < 0 || x >= box.width || y >= box.height) return null;
    return [view.first[0] + Math.floor(y / box.cell), view.first[1] + Math.floor(x / box.cell), box];
  };
  let drag = null;
  canvas.addEventListener("pointerdown", (event) => {
    drag = { x: event.clientX, y: event.clientY, first: [...view.first], moved: false };
    canvas.setPointerCapture(event.pointerId);
  });
  canvas.addEventListener("pointermove", (event) => {
    if (drag) {
      const { cell } = layout(canvas.clientWidth), [dx, dy] = [event.clientX - drag.x, event.clientY - drag.y];
      drag.moved ||= Math.hypot(dx, dy) > 4;
      if (drag.moved) placeView(drag.first[0] - dy / cell, drag.first[1] - dx / cell);
      return;
    }
    const at = cellAt(event);
    if (at) moveCross(at[0], at[1]);
  });
  canvas.addEventListener("pointerup", (event) => {
    const at = cellAt(event);
    if (drag && !drag.moved && at) {
      moveCross(at[0], at[1]);
      setState({ query: state.cross });
    }
    drag = null;
  });
  canvas.addEventListener("pointercancel", () => (drag = null));
}
