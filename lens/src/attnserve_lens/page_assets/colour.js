// Colours. The scale for weights is uniform in OKLab: equal steps of the value are equal steps to
// the eye, and lightness alone tells them apart. It begins at the paper, so that nothing looks like
// nothing.

const dark = window.matchMedia("(prefers-color-scheme: dark)");

function oklabToRgb(l, a, b) {
  const long = (l + 0.3963377774 * a + 0.2158037573 * b) ** 3;
  const medium = (l - 0.1055613458 * a - 0.0638541728 * b) ** 3;
  const short = (l - 0.0894841775 * a - 1.291485548 * b) ** 3;
  return [
    4.0767416621 * long - 3.3077115913 * medium + 0.2309699292 * short,
    -1.2684380046 * long + 2.6097574011 * medium - 0.3413193965 * short,
    -0.0041960863 * long - 0.7034186147 * medium + 1.707614701 * short,
  ];
}

const encode = (c) => Math.round(255 * (c <= 0.0031308 ? 12.92 * c : 1.055 * c ** (1 / 2.4) - 0.055));

// sRGB bytes of a lightness, chroma and hue, with as much of the chroma as the screen has.
function oklch(lightness, chroma, hue) {
  for (let c = chroma; ; c -= 0.004) {
    const kept = Math.max(c, 0), turn = (hue * Math.PI) / 180;
    const lab = [lightness, kept * Math.cos(turn), kept * Math.sin(turn)];
    const rgb = oklabToRgb(...lab);
    if (kept === 0 || rgb.every((each) => each >= 0 && each <= 1)) {
      return { rgb: rgb.map((each) => encode(Math.min(1, Math.max(0, each)))), lab };
    }
  }
}

// 256 colours along a path from the paper's lightness to the other end, evenly spaced on it.
function makeScale(isDark) {
  const [from, to] = isDark ? [0.205, 0.97] : [1, 0.24];
  const steps = 2048, path = [], lengths = [0];
  for (let i = 0; i <= steps; i++) {
    const t = i / steps;
    const hue = isDark ? 275 - 175 * t : 95 + 185 * t;
    path.push(oklch(from + (to - from) * t, 0.16 * Math.sin(Math.PI * t) ** 0.8, hue));
    if (i) lengths.push(lengths[i - 1] + Math.hypot(...path[i].lab.map((v, j) => v - path[i - 1].lab[j])));
  }
  const colours = new Uint8Array(256 * 3);
  for (let i = 0, at = 0; i < 256; i++) {
    while (at < steps && lengths[at] < (i / 255) * lengths[steps]) at++;
    colours.set(path[at].rgb, 3 * i);
  }
  return colours;
}

const palette = { scale: null, scale32: null, ink: "", muted: "", line: "", accent: "", paper: "", mark: "" };

function readPalette() {
  palette.scale = makeScale(dark.matches);
  palette.scale32 = new Uint32Array(256);
  for (let i = 0; i < 256; i++) {
    const [r, g, b] = palette.scale.subarray(3 * i, 3 * i + 3);
    palette.scale32[i] = (255 << 24) | (b << 16) | (g << 8) | r; // little-endian RGBA
  }
  const style = getComputedStyle(document.documentElement);
  for (const name of ["ink", "muted", "line", "accent", "paper", "mark", "control"]) {
    palette[name] = style.getPropertyValue(`--${name}`).trim();
  }
}

// A colour for a head: neighbours are far apart in hue; all stand out from the paper alike.
function headColour(head) {
  const [r, g, b] = oklch(dark.matches ? 0.78 : 0.55, 0.15, (head * 137.508 + 250) % 360).rgb;
  return `rgb(${r} ${g} ${b})`;
}

// Where a weight is on the colour scale, 0 to 1.
function intensity(scale, weight, heaviestOfRow, visible) {
  if (weight <= 0) return 0;
  if (scale === "weight") return weight;
  if (scale === "row") return heaviestOfRow > 0 ? weight / heaviestOfRow : 0;
  // From an eighth of uniform (0) over uniform (3/9) to 64 times uniform (1).
  if (scale === "lift") return Math.min(1, Math.max(0, (Math.log2(weight * visible) + 3) / 9));
  return Math.sqrt(weight);
}

const scaleEnds = { root: ["0", "1"], weight: ["0", "1"], row: ["0", "heaviest"], lift: ["⅛×", "64×"] };

function cssColour(t) {
  const at = 3 * Math.round(255 * Math.min(1, Math.max(0, t)));
  return `rgb(${palette.scale[at]} ${palette.scale[at + 1]} ${palette.scale[at + 2]})`;
}

// Black or white, whichever can be read on the colour: by the luminance of WCAG 2.
function textOn(t) {
  const at = 3 * Math.round(255 * Math.min(1, Math.max(0, t)));
  const [r, g, b] = [0, 1, 2].map((i) => {
    const c = palette.scale[at + i] / 255;
    return c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  });
  return 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.179 ? "#000000" : "#ffffff";
}
