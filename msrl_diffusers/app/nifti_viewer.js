// Three orthogonal slices of every NIfTI image in `props.value`, with one cursor, level and window for all of them.
// The body of a function that Gradio calls with `element` (ours), `props` and `watch`; without a network but our server's.

const READERS = {
  2: ["getUint8", 1], 4: ["getInt16", 2], 8: ["getInt32", 4], 16: ["getFloat32", 4], 64: ["getFloat64", 8],
  256: ["getInt8", 1], 512: ["getUint16", 2], 768: ["getUint32", 4],
};
// Axes 0, 1, 2 run to the patient's right, front and top. `across` runs to the right of the picture, `up` upwards.
const PLANES = [
  { name: "axial", normal: 2, across: 0, up: 1 },
  { name: "coronal", normal: 1, across: 0, up: 2 },
  { name: "sagittal", normal: 0, across: 1, up: 2 },
];
const ENDS = [["L", "R"], ["P", "A"], ["I", "S"]];
const PIXELS = 360; // along the longest edge of a picture

let volumes = [];
let newest = 0;

// The bytes of a file, decompressed if they are gzip.
async function readBytes(url) {
  const response = await fetch(url);
  if (!response.ok) throw new Error(`the server answered ${response.status}`);
  const buffer = await response.arrayBuffer();
  const start = new Uint8Array(buffer, 0, 2);
  if (start[0] !== 0x1f || start[1] !== 0x8b) return buffer;
  const stream = new Blob([buffer]).stream().pipeThrough(new DecompressionStream("gzip"));
  return await new Response(stream).arrayBuffer();
}

// A NIfTI-1 image, its voxels reordered so that the axes run to right, front and top (https://nifti.nimh.nih.gov/nifti-1).
function parseNifti(buffer) {
  const view = new DataView(buffer);
  const little = view.getInt32(0, true) === 348;
  if (!little && view.getInt32(0, false) !== 348) throw new Error("it is no NIfTI-1 image");
  const stored = [1, 2, 3].map((axis) => view.getInt16(40 + 2 * axis, little));
  const reader = READERS[view.getInt16(70, little)];
  if (!reader) throw new Error("its type of voxels is not supported");
  if (view.getInt16(254, little) === 0) throw new Error("it has no sform, so left and right are not known");
  const affine = [0, 1, 2].map((row) => [0, 1, 2, 3].map((column) => view.getFloat32(280 + 16 * row + 4 * column, little)));
  const slope = view.getFloat32(112, little) || 1;
  const intercept = view.getFloat32(116, little) || 0;
  const first = view.getFloat32(108, little);

  const edges = [0, 1, 2].map((axis) => Math.hypot(affine[0][axis], affine[1][axis], affine[2][axis]));
  const free = [0, 1, 2];
  const axes = [0, 1, 2].map((direction) => {
    free.sort((one, two) => Math.abs(affine[direction][two]) / edges[two] - Math.abs(affine[direction][one]) / edges[one]);
    return free.shift();
  });
  const flipped = axes.map((axis, direction) => affine[direction][axis] < 0);
  const size = axes.map((axis) => stored[axis]);
  const steps = [1, stored[0], stored[0] * stored[1]];
  const origin = affine.map((row) => row[3]);
  const columns = axes.map((axis, direction) => {
    const sign = flipped[direction] ? -1 : 1;
    if (flipped[direction]) origin.forEach((_, row) => { origin[row] += affine[row][axis] * (stored[axis] - 1); });
    return affine.map((row) => sign * row[axis]);
  });

  const values = new Float32Array(size[0] * size[1] * size[2]);
  const [get, width] = reader;
  let low = Infinity, high = -Infinity, target = 0;
  const at = (direction, index) => (flipped[direction] ? size[direction] - 1 - index : index) * steps[axes[direction]];
  for (let z = 0; z < size[2]; z++)
    for (let y = 0; y < size[1]; y++)
      for (let x = 0; x < size[0]; x++) {
        const value = slope * view[get](first + width * (at(0, x) + at(1, y) + at(2, z)), little) + intercept;
        values[target++] = value;
        if (value < low) low = value;
        if (value > high) high = value;
      }
  return { size, values, low, high, edges: axes.map((axis) => edges[axis]), origin, columns };
}

function control(name) {
  return element.querySelector(`.controls input[name="${name}"]`);
}

function voxel(volume) {
  return volume.size.map((count, axis) => Math.round(Number(control(axis).value) * (count - 1)));
}

function valueAt(volume, [x, y, z]) {
  return volume.values[x + volume.size[0] * (y + volume.size[1] * z)];
}

// Whether the picture shows an axis from its far end: the patient's right on the left.
function mirrored(axis) {
  return axis === 0 && control("radiological").checked;
}

function drawPlane(canvas, volume, plane) {
  const { normal, across, up } = plane;
  const index = voxel(volume);
  const [columns, rows] = [volume.size[across], volume.size[up]];
  const [width, height] = [columns * volume.edges[across], rows * volume.edges[up]];
  const scale = PIXELS / Math.max(width, height);
  canvas.width = Math.round(width * scale);
  canvas.height = Math.round(height * scale);

  const level = Number(control("level").value);
  const window = Math.max(Number(control("window").value), 1e-6);
  const picture = new ImageData(columns, rows);
  const point = [...index];
  for (let row = 0; row < rows; row++)
    for (let column = 0; column < columns; column++) {
      point[up] = rows - 1 - row;
      point[across] = mirrored(across) ? columns - 1 - column : column;
      const gray = 255 * ((valueAt(volume, point) - level) / window + 0.5); // clamped by the array
      picture.data.set([gray, gray, gray, 255], 4 * (column + columns * row));
    }
  const slice = new OffscreenCanvas(columns, rows);
  slice.getContext("2d").putImageData(picture, 0, 0);
  const context = canvas.getContext("2d");
  context.imageSmoothingEnabled = false;
  context.drawImage(slice, 0, 0, canvas.width, canvas.height);

  const x = ((mirrored(across) ? columns - 1 - index[across] : index[across]) + 0.5) * (canvas.width / columns);
  const y = (rows - 1 - index[up] + 0.5) * (canvas.height / rows);
  context.strokeStyle = "rgba(90, 200, 255, 0.6)";
  context.beginPath();
  context.moveTo(x, 0);
  context.lineTo(x, canvas.height);
  context.moveTo(0, y);
  context.lineTo(canvas.width, y);
  context.stroke();

  const [start, end] = mirrored(across) ? [ENDS[across][1], ENDS[across][0]] : ENDS[across];
  context.font = "bold 18px sans-serif";
  context.fillStyle = "#ffd54a";
  context.textBaseline = "middle";
  context.textAlign = "left";
  context.fillText(start, 4, canvas.height / 2);
  context.textAlign = "right";
  context.fillText(end, canvas.width - 4, canvas.height / 2);
  context.textAlign = "center";
  context.fillText(ENDS[up][1], canvas.width / 2, 12);
  context.fillText(ENDS[up][0], canvas.width / 2, canvas.height - 12);
}

function draw() {
  element.querySelectorAll("figure").forEach((figure, number) => {
    const volume = volumes[number];
    if (!volume) return;
    figure.querySelectorAll("canvas").forEach((canvas, plane) => drawPlane(canvas, volume, PLANES[plane]));
    const index = voxel(volume);
    const millimeters = volume.origin.map((start, row) =>
      volume.columns.reduce((sum, column, axis) => sum + column[row] * index[axis], start));
    figure.querySelector("output").textContent =
      `${millimeters.map((value) => value.toFixed(1)).join(", ")} mm: ${valueAt(volume, index).toFixed(3)}`;
  });
}

function makeFigure(entry) {
  const figure = document.createElement("figure");
  figure.appendChild(document.createElement("figcaption")).textContent = entry.title;
  const planes = figure.appendChild(document.createElement("div"));
  planes.className = "planes";
  for (const plane of PLANES) {
    const canvas = planes.appendChild(document.createElement("canvas"));
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", `${entry.title}, ${plane.name} slice`);
  }
  const notes = planes.appendChild(document.createElement("div"));
  notes.className = "notes";
  notes.appendChild(document.createElement("output"));
  const link = notes.appendChild(document.createElement("a"));
  link.textContent = "Download NIfTI";
  link.href = entry.file.url;
  link.download = entry.file.orig_name;
  return figure;
}

function setRange(name, low, high, value) {
  const input = control(name);
  [input.min, input.max] = [low, high];
  input.value = value;
}

// Read what the value names and show all of it at once; a newer value overtakes an older one that is still read.
async function load() {
  const number = ++newest;
  const entries = props.value?.volumes ?? [];
  const status = element.querySelector(".status");
  if (!entries.length) return;
  status.textContent = "Reading ...";
  let read;
  try {
    read = await Promise.all(entries.map(async (entry) => parseNifti(await readBytes(entry.file.url))));
  } catch (error) {
    if (number === newest) status.textContent = `The volume can't be shown: ${error.message}.`;
    return;
  }
  if (number !== newest) return;
  volumes = read;
  const [low, high] = [Math.min(...read.map((one) => one.low)), Math.max(...read.map((one) => one.high))];
  setRange("level", low, high, (low + high) / 2);
  setRange("window", 0, high - low, high - low);
  element.querySelector(".volumes").replaceChildren(...entries.map(makeFigure));
  element.querySelector(".controls").hidden = false;
  status.textContent = "";
  draw();
}

function planeOf(canvas) {
  const figure = canvas.closest("figure");
  const volume = volumes[[...element.querySelectorAll("figure")].indexOf(figure)];
  return [volume, PLANES[[...figure.querySelectorAll("canvas")].indexOf(canvas)]];
}

function moveCursor(event) {
  if (event.target.tagName !== "CANVAS" || !(event.buttons & 1)) return;
  const [, plane] = planeOf(event.target);
  const box = event.target.getBoundingClientRect();
  const across = (event.clientX - box.left) / box.width;
  control(plane.across).value = mirrored(plane.across) ? 1 - across : across;
  control(plane.up).value = 1 - (event.clientY - box.top) / box.height;
  draw();
}

function moveSlice(event) {
  if (event.target.tagName !== "CANVAS") return;
  event.preventDefault();
  const [volume, plane] = planeOf(event.target);
  const input = control(plane.normal);
  input.value = Number(input.value) - Math.sign(event.deltaY) / Math.max(volume.size[plane.normal] - 1, 1);
  draw();
}

element.addEventListener("input", draw);
element.addEventListener("pointerdown", moveCursor);
element.addEventListener("pointermove", moveCursor);
element.addEventListener("wheel", moveSlice, { passive: false });
watch("value", load);
load();
