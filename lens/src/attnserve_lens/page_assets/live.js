// The page of `attnserve inspect --serve`: a text is asked for, its layers when they are looked at.

// Up to so many weights in all layers they are loaded one after another while nothing happens; of
// more, a layer is loaded when it is chosen. So many bytes of codes are kept.
const LOADED_AT_ONCE = 3e7, BYTES_KEPT = 3e8;
const PER_HEAD = ["effective", "first", "special", "own", "previous", "following"];
const kept = []; // [name, bytes] of layers, the latest last
const progress = { waiting: 0, since: 0, failed: "" };
const loadedOf = (map) => map.measures.first.filter(Boolean).length;

async function ask(path, options) {
  const answer = await fetch(path, options).catch(() => {
    throw new Error("attnserve inspect does not answer; is it still running?");
  });
  if (!answer.ok) throw new Error((await answer.json()).error);
  return answer;
}

// A layer is floats, codes, pictures: `live.py` says in which order. Null if it could not be had.
async function fetchLayer(map, layer) {
  const name = `${map.name}-layer-${layer}`;
  if (!progress.waiting++) progress.since = performance.now();
  showProgress(map);
  try {
    const answer = await ask(`layer?map=${map.name}&layer=${layer}`);
    const buffer = await new Response(answer.body.pipeThrough(new DecompressionStream("deflate-raw"))).arrayBuffer();
    if (map !== state.map) return drop(name);
    progress.failed = "";
    const loaded = placeLayer(map, layer, buffer);
    forgetOthers(name, buffer.byteLength);
    return loaded;
  } catch (error) {
    progress.failed = error.message;
    return drop(name);
  } finally {
    progress.waiting--;
    showProgress(map);
  }
}

function drop(name) {
  layers.delete(name);
  return null;
}

function placeLayer(map, layer, buffer) {
  const [heads, queries, keys] = [map.heads.length, map.queries.length, map.keys.length];
  let at = 0;
  const floats = (count) => {
    at += 4 * count;
    return new Float32Array(buffer, at - 4 * count, count);
  };
  map.effective.set(floats(heads * queries), layer * heads * queries);
  map.visible.set(floats(queries), layer * queries);
  map.received.set(floats(heads * keys), layer * heads * keys);
  for (const name of PER_HEAD) {
    const numbers = Array.from(floats(heads));
    if (map.measures[name]) map.measures[name][layer] = numbers;
  }
  const pixels = heads * map.thumbnail[0] * map.thumbnail[1];
  map.thumbnails.set(new Uint8Array(buffer, buffer.byteLength - pixels), layer * pixels);
  showArrived();
  return new Layer(buffer, map, at);
}

// The oldest layers go where many are kept; they are fetched again when they are looked at.
function forgetOthers(name, bytes) {
  kept.push([name, bytes]);
  let total = kept.reduce((sum, each) => sum + each[1], 0);
  while (kept.length > 1 && total > BYTES_KEPT) {
    const [oldest, size] = kept.shift();
    layers.delete(oldest);
    total -= size;
  }
}

const showArrived = oncePerFrame(() => {
  if (!state.data) return;
  drawOverview();
  listAllSinks();
  if ($("spread-lines").value === "heads") listKinds();
  else refreshSpread();
});

function showProgress(map) {
  if (map !== state.map) return;
  const all = map.layers.length, loaded = loadedOf(map);
  $("ask-progress").max = all;
  $("ask-progress").value = loaded;
  $("ask-progress").hidden = loaded === all;
  if (progress.failed) return say(progress.failed, true);
  const passed = Math.round((performance.now() - progress.since) / 1000);
  const how = loaded === all ? "" :
    progress.waiting ? `; loading${passed > 1 ? `, ${passed} s` : ""}` :
    map.onlyLookedAt ? "; the others are loaded when they are chosen, and means are of those loaded" : "";
  say(`${map.queries.length} tokens; ${loaded} of ${all} layers loaded${how}.`);
}

function say(text, wrong = false) {
  $("ask-status").textContent = text;
  $("ask-status").classList.toggle("warning", wrong);
}

function prepareMap(map) {
  const [l, h, q, k] = [map.layers.length, map.heads.length, map.queries.length, map.keys.length];
  map.effective = new Float32Array(l * h * q);
  map.visible = new Float32Array(l * q);
  map.received = new Float32Array(l * h * k);
  map.thumbnails = new Uint8Array(l * h * map.thumbnail[0] * map.thumbnail[1]);
  map.onlyLookedAt = l * h * q * k > LOADED_AT_ONCE;
  const square = ["own", "previous", "following"];
  map.measures = Object.fromEntries(PER_HEAD.map((name) =>
    [name, !map.square && square.includes(name) ? null : Array(l).fill(null)]));
}

async function look() {
  $("ask-go").disabled = true;
  say("Asking …");
  try {
    const body = JSON.stringify({
      model: $("ask-model").value, text: $("ask-text").value, pair: $("ask-pair").value,
      target: $("ask-target-field").hidden ? "" : $("ask-target").value,
    });
    const answer = await ask("look", { method: "POST", headers: { "Content-Type": "application/json" }, body });
    const sequence = await answer.json();
    layers.clear();
    kept.length = 0;
    sequence.maps.forEach(prepareMap);
    meta.sequences = [sequence];
    document.title = document.querySelector("h1").textContent = `${$("ask-model").value}: ${sequence.name}`;
    document.querySelector(".facts").textContent = sequence.facts;
    showAll(true);
    await showSequence(0);
    await new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
    document.documentElement.dataset.ready = String(Math.round(performance.now()));
  } catch (error) {
    say(error.message, true);
  } finally {
    $("ask-go").disabled = false;
  }
}

function showAll(shown) {
  $("main").hidden = $("bar").hidden = !shown;
}

function startLive() {
  const { models, text, pair, model } = meta.live;
  fillSelect($("ask-model"), models.map((each) => [each.name, each.name]), model || models[0]?.name);
  $("ask-text").value = text;
  $("ask-pair").value = pair;
  const chosen = () => {
    $("ask-target-field").hidden = !models.find((each) => each.name === $("ask-model").value)?.target;
  };
  $("ask-model").addEventListener("change", chosen);
  chosen();
  $("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    look();
  });
  $("ask-text").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("ask").requestSubmit();
  });
  showAll(false);
  setInterval(() => progress.waiting && state.map && showProgress(state.map), 1000);
  say(models.length ? "" : "The server has no transformer model that takes text.", !models.length);
  document.documentElement.dataset.live = "";
  if (text) look();
}
