// The page's data: unpacked when it is needed. encoding.py says how it is packed.

const meta = JSON.parse(document.getElementById("meta").textContent);

function fromBase64(text) {
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(text);
  const characters = atob(text);
  const bytes = new Uint8Array(characters.length);
  for (let i = 0; i < bytes.length; i++) bytes[i] = characters.charCodeAt(i);
  return bytes;
}

// The bytes of one data block. The text goes once it has been read: it is the larger part.
async function block(name) {
  const element = document.getElementById(name);
  const packed = fromBase64(element.textContent);
  element.remove();
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate-raw"));
  return new Response(stream).arrayBuffer();
}

// All weights of one layer.
class Layer {
  constructor(buffer, map, start = 0) {
    this.map = map;
    const rows = map.heads.length * map.queries.length, codes = start + 4 * rows;
    this.heaviest = new Float32Array(buffer, start, rows);
    this.codes = new (map.bits === 16 ? Uint16Array : Uint8Array)(buffer, codes, rows * map.keys.length);
    this.unit = 1 / (map.bits === 16 ? 65535 : 255);
    this.edges = new Map();
  }

  // Weights of a query, [Sk], into `out`; head -1 is the mean of all heads.
  row(head, query, out) {
    const { heads, queries, keys } = this.map;
    if (head < 0) {
      const one = new Float32Array(keys.length);
      out.fill(0);
      for (let h = 0; h < heads.length; h++) {
        this.row(h, query, one);
        for (let k = 0; k < keys.length; k++) out[k] += one[k] / heads.length;
      }
      return out;
    }
    const row = head * queries.length + query, start = row * keys.length;
    const factor = this.heaviest[row] * this.unit * this.unit;
    for (let k = 0; k < keys.length; k++) {
      const code = this.codes[start + k];
      out[k] = factor * code * code;
    }
    return out;
  }

  weight(head, query, key) {
    const { queries, keys } = this.map;
    const row = head * queries.length + query;
    const share = this.codes[row * keys.length + key] * this.unit;
    return this.heaviest[row] * share * share;
  }

  // The heaviest `limit` weights of a head within the filter, as [weight, head, query, key].
  heaviestEdges(head, filter, limit) {
    const name = `${head} ${filter} ${limit}`;
    if (this.edges.has(name)) return this.edges.get(name);
    const { queries, keys } = this.map;
    const counts = new Uint32Array(1024), row = new Float32Array(keys.length);
    const bucket = (w) => Math.min(1023, (Math.sqrt(w) * 1024) | 0);
    for (let q = 0; q < queries.length; q++) {
      this.row(head, q, row);
      for (let k = 0; k < keys.length; k++) counts[bucket(row[k])]++;
    }
    let least = 1023;
    for (let seen = counts[1023]; least > 1 && seen < limit; seen += counts[least]) least--;
    const found = [];
    for (let q = 0; q < queries.length; q++) {
      this.row(head, q, row);
      for (let k = 0; k < keys.length; k++) {
        if (row[k] > 0 && bucket(row[k]) >= least && within(this.map, filter, q, k)) {
          found.push([row[k], head, q, k]);
        }
      }
    }
    found.sort((a, b) => b[0] - a[0]);
    found.length = Math.min(found.length, limit);
    this.edges.set(name, found);
    return found;
  }
}

// Whether a query and a key are on the sides of the pair that the filter names.
function within(map, filter, query, key) {
  if (filter === "all" || map.split === null || key === map.sink) return true;
  const side = (position) => (position < map.split ? "a" : "b");
  return side(query) === filter[0] && side(key) === filter[1];
}

const layers = new Map();

// One layer's weights, unpacked at the first call.
function loadLayer(map, layer) {
  const name = `${map.name}-layer-${layer}`;
  if (!layers.has(name)) {
    layers.set(name, meta.live ? fetchLayer(map, layer) : block(name).then((buffer) => new Layer(buffer, map)));
  }
  return layers.get(name);
}

// What is needed from the start: measures and pictures, without the weights.
async function loadMap(map) {
  if (map.ready || meta.live) return map;
  const floats = async (part) => new Float32Array(await block(`${map.name}-${part}`));
  map.effective = await floats("effective");
  map.visible = await floats("visible");
  map.received = await floats("received");
  map.thumbnails = new Uint8Array(await block(`${map.name}-thumbnails`));
  map.ready = true;
  return map;
}

// Unpack the other layers while nothing happens, so that no click has to wait for it.
function loadRest(map) {
  let layer = 0;
  const next = async () => {
    if (layer >= map.layers.length || map !== state.map || map.onlyLookedAt) return;
    if (!(await loadLayer(map, layer++))) return;
    idle(next);
  };
  idle(next);
}

const mean = (values) => values.reduce((sum, value) => sum + value, 0) / (values.length || 1);

function effectiveOf(map, layer, head) {
  const start = (layer * map.heads.length + head) * map.queries.length;
  return map.effective.subarray(start, start + map.queries.length);
}

function visibleOf(map, layer) {
  return map.visible.subarray(layer * map.queries.length, (layer + 1) * map.queries.length);
}

// Mean weight that each key receives; head -1 is the mean of all heads.
function receivedOf(map, layer, head) {
  const count = map.keys.length, at = (h) => (layer * map.heads.length + h) * count;
  if (head >= 0) return map.received.subarray(at(head), at(head) + count);
  const sum = new Float32Array(count);
  for (let h = 0; h < map.heads.length; h++) {
    for (let k = 0; k < count; k++) sum[k] += map.received[at(h) + k] / map.heads.length;
  }
  return sum;
}
