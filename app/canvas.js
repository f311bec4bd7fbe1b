// A canvas that tells the page of every stroke: its value is a PNG of dark lines on a light ground, side x side pixels.
const canvas = element.querySelector("canvas"), pen = canvas.getContext("2d");
const side = Number(props.side), past = [];
let drawing = false, erasing = false, last = null, waiting = false;
const clear = () => { pen.fillStyle = "#fff"; pen.fillRect(0, 0, canvas.width, canvas.height); };
const small = document.createElement("canvas");
small.width = small.height = side;
function tell() {
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => {
    waiting = false;
    const ink = small.getContext("2d");
    ink.imageSmoothingQuality = "high";
    ink.drawImage(canvas, 0, 0, side, side);
    props.value = small.toDataURL("image/png");
    trigger("input");
  });
}
function show(url) {
  const image = new Image();
  image.onload = () => { clear(); pen.imageSmoothingEnabled = true; pen.drawImage(image, 0, 0, canvas.width, canvas.height); };
  image.src = url;
}
function place(event) {
  const box = canvas.getBoundingClientRect();
  return [(event.clientX - box.left) * canvas.width / box.width, (event.clientY - box.top) * canvas.height / box.height];
}
function line(from, to) {
  const width = Number(element.querySelector(".size").value) * canvas.width / side;
  pen.strokeStyle = erasing ? "#fff" : "#111";
  pen.lineWidth = erasing ? 3 * width : width;
  pen.lineCap = pen.lineJoin = "round";
  pen.beginPath(); pen.moveTo(...from); pen.lineTo(...to); pen.stroke();
}
function remember() {
  past.push(canvas.toDataURL());
  if (past.length > 50) past.shift();
}
canvas.addEventListener("pointerdown", (event) => {
  canvas.setPointerCapture(event.pointerId);
  remember();
  drawing = true; last = place(event);
  line(last, [last[0] + 0.1, last[1]]); tell();
  event.preventDefault();
});
canvas.addEventListener("pointermove", (event) => {
  if (!drawing) return;
  const here = place(event);
  line(last, here); last = here; tell();
});
for (const name of ["pointerup", "pointercancel"]) canvas.addEventListener(name, () => { if (drawing) { drawing = false; tell(); } });
const button = (name, action) => element.querySelector(name).addEventListener("click", action);
function choose(eraser) {
  erasing = eraser;
  element.querySelector(".brush").setAttribute("aria-pressed", String(!eraser));
  element.querySelector(".eraser").setAttribute("aria-pressed", String(eraser));
}
button(".brush", () => choose(false));
button(".eraser", () => choose(true));
button(".undo", () => {
  if (!past.length) return;
  const image = new Image();
  image.onload = () => { pen.drawImage(image, 0, 0); tell(); };
  image.src = past.pop();
});
button(".clear", () => { remember(); clear(); tell(); });
clear();
watch("value", () => { if (props.value) { remember(); show(props.value); } });
