// Pictures as the model was given them: Pillow's resizing, timm's cropping and scaling, to the last bit; but that Pillow 13
// resizes along the columns first where that is less work, here rows are always first. A canvas resizes otherwise.

const BITS = 22; // of Pillow's coefficients for bytes (Resample.c, PRECISION_BITS)
const bicubic = (x, a = -0.5) => (x < 1 ? ((a + 2) * x - (a + 3)) * x * x + 1 : x < 2 ? (((x - 5) * x + 8) * x - 4) * a : 0);
const sinc = (x) => (x === 0 ? 1 : Math.sin(x * Math.PI) / (x * Math.PI));
const FILTERS = {
  box: [0.5, (x, signed) => (signed > -0.5 && signed <= 0.5 ? 1 : 0)],
  bilinear: [1, (x) => Math.max(0, 1 - x)],
  hamming: [1, (x) => (x < 1 ? sinc(x) * (0.54 + 0.46 * Math.cos(x * Math.PI)) : 0)],
  bicubic: [2, (x) => bicubic(x)],
  lanczos: [3, (x) => (x < 3 ? sinc(x) * sinc(x / 3) : 0)],
};

/** Round to the nearest integer, halves to the even one, as Python does. */
const halfEven = (x) => (x % 1 === 0.5 || x % 1 === -0.5 ? 2 * Math.round(x / 2) : Math.round(x));

/** Return for each of `wanted` pixels the first of `given` that it reads and the integer weights of those. */
function coefficients(given, wanted, [support, filter]) {
  const scale = given / wanted, wide = Math.max(scale, 1), reach = support * wide;
  return Array.from({ length: wanted }, (_, number) => {
    const center = (number + 0.5) * scale;
    const first = Math.max(0, Math.trunc(center - reach + 0.5));
    const last = Math.min(given, Math.trunc(center + reach + 0.5));
    const weights = [];
    for (let i = first; i < last; i++) {
      const x = (i - center + 0.5) / wide;
      weights.push(filter(Math.abs(x), x));
    }
    const sum = weights.reduce((a, b) => a + b, 0);
    return [first, weights.map((w) => Math.trunc((w / sum) * 2 ** BITS + (w < 0 ? -0.5 : 0.5)))];
  });
}

/** Resize along one axis. image: {width, height, data}, data the bytes of rows of RGB pixels. */
function resizeAxis(image, wanted, horizontal, filter) {
  const given = horizontal ? image.width : image.height;
  if (given === wanted) return image;
  const width = horizontal ? wanted : image.width, height = horizontal ? image.height : wanted;
  const data = new Uint8ClampedArray(3 * width * height);
  const step = horizontal ? 3 : 3 * image.width;
  const plan = coefficients(given, wanted, filter);
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      const [first, weights] = plan[horizontal ? x : y];
      const start = (horizontal ? 3 * y * image.width : 3 * x) + first * step;
      for (let channel = 0; channel < 3; channel++) {
        let sum = 2 ** (BITS - 1);
        for (let i = 0; i < weights.length; i++) sum += weights[i] * image.data[start + i * step + channel];
        data[3 * (y * width + x) + channel] = Math.floor(sum / 2 ** BITS); // clamped to 0 .. 255
      }
    }
  }
  return { width, height, data };
}

/** Return for each of `wanted` pixels the one of `given` that it takes; added up as Pillow does, with its roundings. */
function places(given, wanted) {
  const step = given / wanted;
  let at = step * 0.5;
  return Array.from({ length: wanted }, () => {
    const place = Math.trunc(at);
    at += step;
    return place;
  });
}

function nearest(image, width, height) {
  const data = new Uint8ClampedArray(3 * width * height);
  const rows = places(image.height, height), columns = places(image.width, width);
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      const from = 3 * (rows[y] * image.width + columns[x]);
      data.set(image.data.subarray(from, from + 3), 3 * (y * width + x));
    }
  }
  return { width, height, data };
}

/** Resize as Pillow does: {width, height, data} with the bytes of RGB pixels, row by row. */
export function resize(image, width, height, interpolation) {
  if (image.width === width && image.height === height) return image;
  if (interpolation === "nearest") return nearest(image, width, height);
  const filter = FILTERS[interpolation];
  if (!filter) throw new Error(`an interpolation that this page does not know: ${interpolation}`);
  return resizeAxis(resizeAxis(image, width, true, filter), height, false, filter);
}

/** Return the [width, height] to resize to, as timm's evaluation transform: of the whole picture, before the crop. */
function resizedSize(image, [height, width], mode) {
  if (mode === "squash") return [width, height];
  if (mode === "center" && height === width) {
    const short = Math.min(image.width, image.height);
    return [Math.trunc((width * image.width) / short), Math.trunc((width * image.height) / short)];
  }
  const ratios = [image.height / height, image.width / width];
  const ratio = mode === "border" ? Math.max(...ratios) : Math.min(...ratios);
  return [halfEven(image.width / ratio), halfEven(image.height / ratio)];
}

function crop(image, width, height, fill) {
  const start = (have, want) => (have >= want ? halfEven((have - want) / 2) : -Math.floor((want - have) / 2));
  const left = start(image.width, width), top = start(image.height, height);
  const data = new Uint8ClampedArray(3 * width * height);
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      const row = y + top, column = x + left;
      const inside = row >= 0 && row < image.height && column >= 0 && column < image.width;
      const from = 3 * (row * image.width + column);
      data.set(inside ? image.data.subarray(from, from + 3) : fill, 3 * (y * width + x));
    }
  }
  return { width, height, data };
}

/** Resize and crop a picture as timm evaluates. config: what the file records; size: [height, width] of the model. */
export function fit(image, config, [height, width]) {
  const mode = config.crop_mode ?? "center";
  const whole = [height, width].map((side) => Math.floor(side / (config.crop_pct || 0.875)));
  const fill = mode === "border" ? config.mean.map((value) => halfEven(255 * value)) : [0, 0, 0];
  return crop(resize(image, ...resizedSize(image, whole, mode), config.interpolation), width, height, fill);
}

/** Return the floats of a picture, channel by channel: (pixel / 255 - mean) / std, each step in float32. */
export function normalized(image, config) {
  const pixels = image.width * image.height, values = new Float32Array(3 * pixels), f = Math.fround;
  for (let channel = 0; channel < 3; channel++) {
    const mean = f(config.mean[channel]), std = f(config.std[channel]);
    for (let i = 0; i < pixels; i++) {
      values[channel * pixels + i] = f(f(image.data[3 * i + channel] / 255) - mean) / std;
    }
  }
  return values;
}

/** Return the bytes of a picture as a file takes them that scales them itself: by pixels (nhwc) or by channels (nchw). */
export function bytes(image, layout) {
  if (layout === "nhwc") return new Uint8Array(image.data);
  const pixels = image.width * image.height;
  return Uint8Array.from({ length: 3 * pixels }, (_, i) => image.data[3 * (i % pixels) + Math.floor(i / pixels)]);
}
