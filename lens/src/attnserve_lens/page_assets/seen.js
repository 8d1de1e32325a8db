// What the model saw or heard, under the attention of the chosen query: a picture whose patches are
// keys, or a spectrogram whose frames are. seen.py says what there is.

// The kept picture of what is shown: canvases of its own size.
const shownNow = { of: null, plain: null, grey: null, waiting: null };
const SOUND_EDGE = 92, SOUND_TALL = 120, SOUND_BARS = 70, MOST_ROWS = 48;

const seenOf = () => meta.sequences?.[+$("sequence").value]?.seen ?? null;

async function unpackSeen(seen) {
  seen.bytes ??= block(seen.block).then((buffer) => new Uint8Array(buffer));
  return seen.bytes;
}

function canvasOf(width, height, colourOf) {
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [width, height];
  const context = canvas.getContext("2d"), image = context.createImageData(width, height);
  for (let at = 0; at < width * height; at++) {
    image.data.set(colourOf(at), 4 * at);
    image.data[4 * at + 3] = 255;
  }
  context.putImageData(image, 0, 0);
  return canvas;
}

// Show what belongs to the sequence; called when another one is chosen.
async function setUpSeen() {
  const seen = seenOf();
  $("seen-view").hidden = $("seen-link").hidden = !seen;
  Object.assign(shownNow, { of: seen, plain: null, grey: null });
  if (!seen) return;
  const picture = seen.kind === "picture", bytes = await unpackSeen(seen);
  if (seen !== shownNow.of) return;
  $("seen-title").textContent = picture ? "Over the picture" : "Over the sound";
  $("seen-hint").textContent = picture
    ? "Left the picture with the query's patch, right what the query attends to. A click on the left picks a patch as the query; arrow keys move it."
    : "Time runs to the right. Above the spectrogram, below it what the chosen query attends to, and every query as a row. A click on a row, or ↑ and ↓, picks the query.";
  $("seen-picture").hidden = !picture;
  $("seen-sound").hidden = picture;
  if (picture) {
    shownNow.plain = canvasOf(seen.width, seen.height, (at) => bytes.subarray(3 * at, 3 * at + 3));
    shownNow.grey = canvasOf(seen.width, seen.height, (at) => {
      const grey = 0.299 * bytes[3 * at] + 0.587 * bytes[3 * at + 1] + 0.114 * bytes[3 * at + 2];
      return [grey, grey, grey];
    });
  } else {
    // The lowest bin is at the bottom.
    shownNow.plain = canvasOf(seen.frames, seen.bins, (at) => {
      const [x, y] = [at % seen.frames, Math.floor(at / seen.frames)];
      const level = 3 * bytes[(seen.bins - 1 - y) * seen.frames + x];
      return palette.scale.subarray(level, level + 3);
    });
  }
  invalidate("seen-view");
}

// Whether queries, and keys, are tokens of what is shown.
const overQueries = () => state.map.over.queries, overKeys = () => state.map.over.keys;

function drawSeen() {
  const seen = shownNow.of;
  if (!seen || !shownNow.plain || !state.data) return;
  const { map, data, query } = state;
  const row = data.row(state.head, query, new Float32Array(map.keys.length));
  if (seen.kind === "picture") drawPicture(seen, row);
  else drawSound(seen, row);
}

function drawPicture(seen, row) {
  const height = (canvas) => Math.round(Math.min(canvas.clientWidth, 460) * (seen.height / seen.width));
  const box = (canvas) => Math.min(canvas.clientWidth, 460);
  const left = $("seen-query"), right = $("seen-keys");
  const one = prepare(left, height(left)), other = prepare(right, height(right));
  one.context.imageSmoothingEnabled = other.context.imageSmoothingEnabled = false;
  one.context.drawImage(shownNow.plain, 0, 0, box(left), one.height);
  other.context.drawImage(shownNow.grey, 0, 0, box(right), other.height);
  const { first, rows, columns } = seen, { map, query } = state;
  const place = (token, width, tall) => {
    const patch = token - first;
    return [(patch % columns) * (width / columns), Math.floor(patch / columns) * (tall / rows), width / columns, tall / rows];
  };
  const mark = (context, token, width, tall) => {
    if (token < first) return;
    for (const [line, colour] of [[5, palette.paper], [2.5, palette.mark]]) {
      context.lineWidth = line;
      context.strokeStyle = colour;
      context.strokeRect(...place(token, width, tall));
    }
  };
  const visible = visibleOf(map, state.layer)[query];
  const heaviest = row.reduce((most, weight) => Math.max(most, weight), 0);
  if (overKeys()) {
    for (let key = first; key < first + rows * columns; key++) {
      other.context.globalAlpha = 0.72;
      other.context.fillStyle = cssColour(intensity(state.scale, row[key], heaviest, visible));
      other.context.fillRect(...place(key, box(right), other.height));
    }
    other.context.globalAlpha = 1;
  }
  if (overQueries()) {
    mark(one.context, query, box(left), one.height);
    mark(other.context, query, box(right), other.height);
  }
  let best = first;
  for (let key = first; key < first + rows * columns; key++) if (row[key] > row[best]) best = key;
  const elsewhere = row.slice(0, first).reduce((sum, weight) => sum + weight, 0);
  const rest = first ? `; ${percent(elsewhere)} on ${map.keys.slice(0, first).join(" ")}` : "";
  $("seen-caption").textContent = `${headName()}: query ${query} “${map.queries[query]}” gives most to patch ${map.keys[best]}: ${weightText(row[best])}${rest}`;
  left.setAttribute("aria-label", `The picture, ${rows} by ${columns} patches; the query is ${map.queries[query]}`);
  right.setAttribute("aria-label", `The picture under the weights of ${headName()}`);
}

const timeText = (seen, token) => {
  const frame = token * seen.frames_per_token;
  return seen.seconds_per_frame === null ? `frame ${frame}` : `${(frame * seen.seconds_per_frame).toFixed(2)} s`;
};

function drawSound(seen, row) {
  const { map, data, query } = state;
  const canvas = $("seen-time"), listed = overQueries() ? 0 : Math.min(map.queries.length, MOST_ROWS);
  const tall = SOUND_TALL + SOUND_BARS + 22 + 18 * listed;
  const { context, width } = prepare(canvas, tall);
  const wide = width - SOUND_EDGE - 4, tokens = seen.frames / seen.frames_per_token;
  const x = (token) => SOUND_EDGE + (token / tokens) * wide;
  context.imageSmoothingEnabled = true;
  context.drawImage(shownNow.plain, SOUND_EDGE, 0, wide, SOUND_TALL);
  context.strokeStyle = palette.control;
  context.strokeRect(SOUND_EDGE - 0.5, -0.5, wide + 1, SOUND_TALL + 1);
  context.fillStyle = palette.muted;
  context.textBaseline = "middle";
  context.textAlign = "right";
  context.fillText("spectrogram", SOUND_EDGE - 6, SOUND_TALL / 2);
  const bottom = SOUND_TALL + SOUND_BARS;
  context.fillText("weight", SOUND_EDGE - 6, bottom - SOUND_BARS / 2);
  if (overKeys()) {
    const heaviest = row.reduce((most, weight) => Math.max(most, weight), 0);
    context.fillStyle = palette.accent;
    context.beginPath();
    context.moveTo(x(0), bottom);
    for (let key = 0; key < tokens; key++) {
      const y = bottom - (heaviest > 0 ? row[key] / heaviest : 0) * (SOUND_BARS - 8);
      context.lineTo(x(key), y);
      context.lineTo(x(key + 1), y);
    }
    context.lineTo(x(tokens), bottom);
    context.fill();
  }
  if (overQueries()) {
    context.fillStyle = palette.mark;
    context.fillRect(x(query) - 1, 0, Math.max(2, x(query + 1) - x(query)), bottom);
  }
  drawTimes(context, seen, tokens, x, bottom);
  drawRows(context, seen, tokens, wide, listed, bottom + 22);
  let best = 0;
  for (let key = 1; key < row.length; key++) if (row[key] > row[best]) best = key;
  const asked = overQueries() ? `at ${timeText(seen, query)}` : `${query} “${map.queries[query]}”`;
  const found = overKeys() ? `at ${timeText(seen, best)}` : `to ${best} “${map.keys[best]}”`;
  $("seen-caption").textContent = `${headName()}: query ${asked} gives most ${found}: ${weightText(row[best])}`;
  canvas.setAttribute("aria-label", `Spectrogram of ${timeText(seen, tokens)}, and the weights of ${headName()} along it`);
}

function drawTimes(context, seen, tokens, x, top) {
  context.fillStyle = palette.ink;
  context.textAlign = "center";
  const step = niceStep(tokens);
  for (let token = 0; token < tokens; token += step) {
    context.textAlign = token ? "center" : "left";
    context.fillText(timeText(seen, token), x(token), top + 11);
  }
}

// Every query's weights along time, where queries are texts.
function drawRows(context, seen, tokens, wide, listed, top) {
  const { map, data, query } = state;
  if (!listed || !overKeys()) return;
  const first = firstRow(listed), visible = visibleOf(map, state.layer);
  const one = new Float32Array(map.keys.length);
  for (let at = 0; at < listed; at++) {
    const q = first + at;
    data.row(state.head, q, one);
    const heaviest = one.reduce((most, weight) => Math.max(most, weight), 0);
    const line = canvasOf(tokens, 1, (key) => {
      const t = 3 * Math.round(255 * Math.min(1, intensity(state.scale, one[key], heaviest, visible[q])));
      return palette.scale.subarray(t, t + 3);
    });
    const y = top + 18 * at;
    context.imageSmoothingEnabled = false;
    context.drawImage(line, SOUND_EDGE, y + 1, wide, 16);
    context.fillStyle = q === query ? palette.mark : palette.ink;
    context.textAlign = "right";
    context.fillText(fitted(context, `${q === query ? "▸ " : ""}${map.queries[q]}`, SOUND_EDGE - 8), SOUND_EDGE - 6, y + 9);
  }
}

const firstRow = (listed) => Math.min(state.map.queries.length - listed, Math.max(0, state.query - (listed >> 1)));

function listenSeen() {
  const move = (by) => setState({ query: Math.min(state.map.queries.length - 1, Math.max(0, state.query + by)) });
  const left = $("seen-query"), time = $("seen-time");
  left.addEventListener("click", (event) => {
    const seen = shownNow.of, place = left.getBoundingClientRect();
    if (!seen || !overQueries()) return;
    const width = Math.min(place.width, 460), tall = width * (seen.height / seen.width);
    const column = Math.floor(((event.clientX - place.left) / width) * seen.columns);
    const row = Math.floor(((event.clientY - place.top) / tall) * seen.rows);
    if (column < 0 || column >= seen.columns || row < 0 || row >= seen.rows) return;
    setState({ query: seen.first + row * seen.columns + column });
  });
  left.addEventListener("keydown", (event) => {
    const seen = shownNow.of;
    if (!seen || event.ctrlKey || event.altKey || event.metaKey) return;
    const far = overQueries() ? seen.columns : 1;
    const moves = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -far, ArrowDown: far };
    if (!moves[event.key]) return;
    move(moves[event.key]);
    event.preventDefault();
  });
  time.addEventListener("click", (event) => {
    const seen = shownNow.of, place = time.getBoundingClientRect();
    if (!seen) return;
    const [x, y] = [event.clientX - place.left - SOUND_EDGE, event.clientY - place.top];
    if (overQueries()) {
      const tokens = seen.frames / seen.frames_per_token;
      const token = Math.floor((x / (place.width - SOUND_EDGE - 4)) * tokens);
      if (token >= 0 && token < tokens) setState({ query: token });
      return;
    }
    const listed = Math.min(state.map.queries.length, MOST_ROWS);
    const at = Math.floor((y - SOUND_TALL - SOUND_BARS - 22) / 18);
    if (at >= 0 && at < listed) setState({ query: firstRow(listed) + at });
  });
  time.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.altKey || event.metaKey) return;
    const far = event.shiftKey ? 10 : 1;
    const moves = { ArrowLeft: -far, ArrowUp: -far, ArrowRight: far, ArrowDown: far };
    if (!moves[event.key]) return;
    move(moves[event.key]);
    event.preventDefault();
  });
}
