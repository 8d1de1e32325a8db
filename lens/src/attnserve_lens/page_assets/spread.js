// How thin attention is spread: effective keys against the position of the query.

const MARGIN = { left: 46, right: 118, top: 12, bottom: 34 };

function spreadLines() {
  const { map } = state, lines = [];
  const count = map.queries.length;
  const meanOf = (l) => {
    const sum = new Float32Array(count);
    map.heads.forEach((_, h) => effectiveOf(map, l, h).forEach((value, i) => (sum[i] += value / map.heads.length)));
    return sum;
  };
  const kinds = layerKinds(), chosenLines = $("spread-lines").value;
  if (chosenLines === "kinds" && kinds.length > 1) {
    kinds.forEach((kind, at) => {
      const values = new Float32Array(count);
      kind.layers.forEach((l) => meanOf(l).forEach((value, i) => (values[i] += value / kind.layers.length)));
      lines.push({ name: kind.name, values, colour: headColours[at], width: 2.4, dash: at ? [7, 4] : [] });
    });
  } else if (chosenLines !== "heads") {
    map.layers.forEach((layer, l) => map.measures.effective[l] && lines.push({ name: `layer ${layer}`, values: meanOf(l), colour: headColours[l % headColours.length], width: l === state.layer ? 3 : 1.4 }));
  } else {
    map.heads.forEach((head, h) => {
      const chosen = h === state.head;
      lines.push({ name: `head ${head}`, values: effectiveOf(map, state.layer, h), colour: headColours[h], width: chosen ? 3 : 1.1 });
    });
    lines.push({ name: "mean of heads", values: meanOf(state.layer), colour: palette.ink, width: 2, dash: [7, 4] });
  }
  lines.push({ name: "uniform", values: visibleOf(map, state.layer), colour: palette.muted, width: 2, dash: [2, 3] });
  return lines;
}

// Layers that see fewer keys than others do (a window) are local; a layer that is not loaded is in
// neither. A key counts as seen where any head gives it weight, so a few may be missed.
function layerKinds() {
  const { map } = state;
  const most = map.layers.map((_, l) => visibleOf(map, l).reduce((found, each) => Math.max(found, each), 0));
  const all = Math.max(...most), loaded = [...map.layers.keys()].filter((l) => most[l]);
  return [
    { name: "local", layers: loaded.filter((l) => most[l] < 0.9 * all) },
    { name: "global", layers: loaded.filter((l) => most[l] >= 0.9 * all) },
  ].map((kind) => ({ ...kind, most: Math.max(0, ...kind.layers.map((l) => most[l])) })).filter((kind) => kind.layers.length);
}

function listKinds() {
  const { map } = state, kinds = layerKinds();
  $("kinds").hidden = kinds.length < 2;
  $("spread-lines").querySelector("[value=kinds]").hidden = kinds.length < 2;
  if (kinds.length < 2) return;
  const average = (name, kind) => map.measures[name] ? mean(kind.layers.map((l) => mean(map.measures[name][l]))) : null;
  const share = (kind, name) => (average(name, kind) === null ? "–" : percent(average(name, kind)));
  fillTable($("kinds-table"), ["layers", "which", "keys seen, at most", "effective keys", "first key", "the token before"],
    kinds.map((kind) => [kind.name, kind.layers.map((l) => map.layers[l]).join(", "), String(kind.most),
      keysText(average("effective", kind)), share(kind, "first"), share(kind, "previous")]));
}

// Of long inputs a point of a curve is the mean of some positions: neighbours differ so much that
// the lines of all heads would cover each other.
const positionsAPoint = (count) => Math.max(1, Math.round(count / 64));

// The curves stay while only the position moves: they are kept as a picture.
const curves = { picture: null, lines: null, plot: null, step: 1 };

function drawSpread() {
  const canvas = $("spread-canvas"), count = state.map.queries.length;
  if (!curves.picture) drawCurves(canvas, count);
  const { context } = prepare(canvas), { plot } = curves;
  const x = plot.x + (count > 1 ? (state.query / (count - 1)) * plot.w : plot.w / 2);
  context.save();
  context.setTransform(1, 0, 0, 1, 0, 0);
  context.drawImage(curves.picture, 0, 0);
  context.restore();
  context.strokeStyle = palette.mark;
  context.lineWidth = 1;
  context.strokeRect(x, plot.y, 0, plot.h);
  readSpread(curves.lines);
}

function refreshSpread() {
  curves.picture = null;
  drawSpread();
}

function drawCurves(canvas, count) {
  const { context, width, height } = prepare(canvas);
  const lines = spreadLines(), top = state.map.visible.reduce((most, each) => Math.max(most, each), 2);
  const plot = { x: MARGIN.left, y: MARGIN.top, w: width - MARGIN.left - MARGIN.right, h: height - MARGIN.top - MARGIN.bottom };
  const x = (i) => plot.x + (count > 1 ? (i / (count - 1)) * plot.w : plot.w / 2);
  const y = (value) => plot.y + plot.h * (1 - Math.log2(Math.max(1, value)) / Math.log2(top));
  drawAxes(context, plot, top, count, x, y);
  for (const line of lines) {
    context.strokeStyle = line.colour;
    context.lineWidth = line.width;
    context.setLineDash(line.dash ?? []);
    context.beginPath();
    const step = positionsAPoint(count);
    for (let i = 0; i < count; i += step) {
      const part = line.values.subarray(i, i + step);
      context.lineTo(x(i + (part.length - 1) / 2), y(mean(Array.from(part))));
    }
    context.stroke();
  }
  context.setLineDash([]);
  labelLines(context, lines, plot, y, count);
  const picture = document.createElement("canvas");
  [picture.width, picture.height] = [canvas.width, canvas.height];
  picture.getContext("2d").drawImage(canvas, 0, 0);
  Object.assign(curves, { picture, lines, plot, step: positionsAPoint(count) });
  listSpread(lines, count);
  listKinds();
}

function drawAxes(context, plot, top, count, x, y) {
  context.fillStyle = palette.muted;
  context.strokeStyle = palette.line;
  context.lineWidth = 1;
  context.textAlign = "right";
  context.textBaseline = "middle";
  for (let value = 1; value <= top; value *= top > 64 ? 4 : 2) {
    context.beginPath();
    context.moveTo(plot.x, y(value));
    context.lineTo(plot.x + plot.w, y(value));
    context.stroke();
    context.fillText(String(value), plot.x - 6, y(value));
  }
  context.textAlign = "center";
  for (let i = 0; i < count; i += niceStep(count)) context.fillText(String(i), x(i), plot.y + plot.h + 12);
  context.fillText("position of the query", plot.x + plot.w / 2, plot.y + plot.h + 27);
}

// Names at the lines' ends, moved apart where they would overlap; the chosen ones first.
function labelLines(context, lines, plot, y, count) {
  const step = positionsAPoint(count), last = (Math.ceil(count / step) - 1) * step;
  const endOf = (line) => mean(Array.from(line.values.subarray(last)));
  const room = 13, labels = lines.map((line) => ({ line, at: y(endOf(line)) }));
  labels.sort((a, b) => a.at - b.at);
  for (let i = 1; i < labels.length; i++) labels[i].at = Math.max(labels[i].at, labels[i - 1].at + room);
  const over = labels.length ? labels[labels.length - 1].at - (plot.y + plot.h) : 0;
  if (over > 0) {
    let limit = plot.y + plot.h;
    for (let i = labels.length - 1; i >= 0; i--) {
      labels[i].at = Math.min(labels[i].at, limit);
      limit = labels[i].at - room;
    }
  }
  context.textAlign = "left";
  for (const { line, at } of labels) {
    const end = y(endOf(line)), from = plot.x + plot.w;
    context.strokeStyle = line.colour;
    context.lineWidth = Math.max(1.5, line.width);
    context.beginPath();
    context.moveTo(from + 2, end);
    context.lineTo(from + 14, at);
    context.stroke();
    context.fillStyle = palette.ink;
    context.font = context.font.replace(/^(bold )?/, line.width >= 3 ? "bold " : "");
    context.fillText(line.name, from + 18, at);
  }
  context.font = context.font.replace(/^bold /, "");
}

function readSpread(lines) {
  const { map, query } = state;
  const visible = visibleOf(map, state.layer)[query];
  const named = lines.filter((line) => line.width >= 2 && line.name !== "uniform");
  $("spread-readout").textContent = `Position ${query} “${map.queries[query]}”, ${visible} keys to see: ` +
    named.map((line) => `${line.name} ${keysText(line.values[query])} (${percent(line.values[query] / visible)} of uniform)`).join(", ") +
    (curves.step > 1 ? `. Each point of a curve is the mean of ${curves.step} positions.` : "");
}

function listSpread(lines, count) {
  $("spread-canvas").setAttribute("aria-label", `Effective keys by position, layer ${state.map.layers[state.layer]}; the table below holds figures`);
  const places = [...new Set([0, 1, 2, 3, 4].map((i) => Math.round((i * (count - 1)) / 4)))];
  fillTable($("spread-table"), ["line", ...places.map((place) => `at ${place}`), "mean"],
    lines.map((line) => [line.name, ...places.map((place) => keysText(line.values[place])), keysText(mean(Array.from(line.values)))]));
}

function listenSpread() {
  const canvas = $("spread-canvas");
  $("spread-lines").addEventListener("change", refreshSpread);
  canvas.addEventListener("keydown", (event) => {
    const far = event.shiftKey ? 10 : 1, last = state.map.queries.length - 1;
    const to = { ArrowLeft: state.query - far, ArrowRight: state.query + far, Home: 0, End: last }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    setState({ query: Math.min(last, Math.max(0, to)) });
  });
  canvas.addEventListener("click", (event) => {
    const place = canvas.getBoundingClientRect(), wide = place.width - MARGIN.left - MARGIN.right;
    const share = (event.clientX - place.left - MARGIN.left) / wide, last = state.map.queries.length - 1;
    setState({ query: Math.min(last, Math.max(0, Math.round(share * last))) });
  });
}
