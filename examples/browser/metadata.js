// What an ONNX file says of itself, read from its bytes: onnxruntime-web does not give its metadata.
// A file is a ModelProto (https://github.com/onnx/onnx/blob/main/onnx/onnx.proto): field 14 are entries, key and value.

const METADATA = 14, KEY = 1, VALUE = 2;

/** Return the metadata of the bytes (Uint8Array) of an ONNX file as an object of texts. */
export function readMetadata(bytes) {
  const found = {};
  for (const [field, content] of fields(bytes)) {
    if (field !== METADATA || content === null) continue;
    const entry = Object.fromEntries(fields(content));
    const text = (part) => new TextDecoder().decode(part ?? new Uint8Array());
    found[text(entry[KEY])] = text(entry[VALUE]);
  }
  return found;
}

/** Yield [number, bytes] of each field of a protobuf message; null in the place of numbers. */
function* fields(bytes) {
  let at = 0;
  const varint = () => {
    let value = 0, weight = 1, byte;
    do {
      if (at >= bytes.length) throw new Error("this is no ONNX file, or a part of it is missing");
      byte = bytes[at++];
      value += (byte & 127) * weight;
      weight *= 128;
    } while (byte > 127);
    return value;
  };
  while (at < bytes.length) {
    const tag = varint(), field = Math.floor(tag / 8), kind = tag % 8;
    if (kind === 2) {
      const length = varint();
      if (length > bytes.length - at) throw new Error("this is no ONNX file, or a part of it is missing");
      yield [field, bytes.subarray(at, (at += length))];
    } else {
      if (kind === 0) varint();
      else if (kind === 1) at += 8;
      else if (kind === 5) at += 4;
      else throw new Error("this is no ONNX file");
      yield [field, null];
    }
  }
}
