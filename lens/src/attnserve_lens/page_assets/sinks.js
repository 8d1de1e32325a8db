// Where weight gathers: the mean weight that each key receives.

function heaviestKeys(values, limit) {
  return Array.from(values.keys()).sort((a, b) => values[b] - values[a]).slice(0, limit);
}

function sinkRows(values) {
  const { map } = state, total = values.reduce((sum, value) => sum + value, 0) || 1;
  return heaviestKeys(values, 10).map((key) => [
    { text: map.keys[key], word: true }, String(key), weightText(values[key]), { text: "", meter: values[key] },
    `${((values[key] / total) * map.keys.length).toFixed(1)}×`,
  ]);
}

const SINK_HEADINGS = [{ text: "key", word: true }, "position", "weight", "", "of the mean key"];

function drawSinks() {
  const { map } = state, values = receivedOf(map, state.layer, state.head);
  const { context, width, height } = prepare($("sinks-canvas"));
  const plot = { x: MARGIN.left, y: 24, w: width - MARGIN.left - 12, h: height - 58 };
  const most = Math.max(...values) || 1, wide = plot.w / values.length;
  context.textBaseline = "middle";
  context.textAlign = "right";
  context.strokeStyle = palette.line;
  for (const share of [0, 0.5, 1]) {
    const y = plot.y + plot.h * (1 - share);
    context.strokeRect(plot.x, y, plot.w, 0);
    context.fillStyle = palette.muted;
    context.fillText(share ? weightText(most * share) : "0", plot.x - 5, y);
  }
  context.textAlign = "center";
  for (let k = 0; k < values.length; k += niceStep(values.length)) context.fillText(String(k), plot.x + (k + 0.5) * wide, plot.y + plot.h + 12);
  context.fillText("position of the key", plot.x + plot.w / 2, plot.y + plot.h + 27);
  context.fillStyle = palette.accent;
  values.forEach((value, k) => {
    const tall = (plot.h * value) / most;
    context.fillRect(plot.x + k * wide, plot.y + plot.h - tall, Math.max(1, wide - (wide > 3 ? 1 : 0)), tall);
  });
  context.fillStyle = palette.ink;
  context.strokeStyle = palette.paper;
  context.lineWidth = 4;
  const drawn = [];
  for (const key of heaviestKeys(values, 3)) {
    const text = fitted(context, map.keys[key], 110), half = context.measureText(text).width / 2;
    const x = Math.min(Math.max(plot.x + (key + 0.5) * wide, half), width - half);
    const y = plot.y + plot.h * (1 - values[key] / most) - 9;
    if (drawn.some((other) => Math.abs(other.x - x) < other.half + half + 4 && Math.abs(other.y - y) < 14)) continue;
    drawn.push({ x, y, half });
    // Around the letters, so that they are read where they reach over a taller bar.
    context.strokeText(text, x, y);
    context.fillText(text, x, y);
  }
  context.lineWidth = 1;
  const best = heaviestKeys(values, 1)[0];
  $("sinks-caption").textContent = `${headName()}: key ${best} “${map.keys[best]}” gets ${percent(values[best])} of each query's weight` +
    (map.special.length ? `; the model's own tokens get ${percent(map.special.reduce((sum, key) => sum + values[key], 0))} together.` : ".");
  $("sinks-canvas").setAttribute("aria-label", `Weight received by key, ${headName()}; the tables below hold the heaviest`);
  $("sinks-head-title").textContent = `${headName()}, heaviest keys`;
  fillTable($("sinks-head"), SINK_HEADINGS, sinkRows(values));
}

function listAllSinks() {
  const { map } = state, sum = new Float32Array(map.keys.length);
  const loaded = [...map.layers.keys()].filter((l) => map.measures.first[l]);
  loaded.forEach((l) => receivedOf(map, l, -1).forEach((value, k) => (sum[k] += value / loaded.length)));
  fillTable($("sinks-all"), SINK_HEADINGS, sinkRows(sum));
  const average = (name, l) => (map.measures[name] ? percent(mean(map.measures[name][l])) : "–");
  fillTable($("sinks-layers"), ["layer", "first key", "model's own tokens", "most in one head"], loaded.map((l) => {
    const numbers = map.measures.special[l], most = numbers.indexOf(Math.max(...numbers));
    return [String(map.layers[l]), average("first", l), average("special", l), `${percent(numbers[most])} in head ${map.heads[most]}`];
  }));
}
