// Draws the point cloud of `props.value` (see views.cloud) on the canvas of this component, with a depth buffer and no library.
// The first view is that of the camera. The scene then sways slowly about its pivot, until someone drags it; a double click
// lets it sway again.
const canvas = element.querySelector("canvas");
const context = canvas.getContext("2d");
const still = window.matchMedia("(prefers-reduced-motion: reduce)").matches;
let cloud = null, yaw = 0, pitch = 0, swaying = !still, began = null, grip = null, visible = true;

const bytes = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));

function load() {
  const data = props.value ? JSON.parse(props.value) : null;
  cloud = data && { ...data, points: new Float32Array(bytes(data.points).buffer), colors: bytes(data.colors) };
  if (cloud) canvas.style.aspectRatio = cloud.aspect;
  draw();
}

function draw() {
  const width = Math.min(800, Math.round(canvas.clientWidth * Math.min(window.devicePixelRatio, 2)));
  const height = cloud ? Math.max(1, Math.round(width / cloud.aspect)) : 0;
  if (!cloud || width < 1) return;
  if (canvas.width !== width || canvas.height !== height) [canvas.width, canvas.height] = [width, height];
  const image = context.createImageData(width, height);
  const pixels = new Uint32Array(image.data.buffer);
  const nearest = new Float32Array(width * height).fill(Infinity);
  const focal = width / 2 / Math.tan((cloud.fov * Math.PI) / 360);
  const [cy, sy, cp, sp] = [Math.cos(yaw), Math.sin(yaw), Math.cos(pitch), Math.sin(pitch)];
  const [px, py, pz] = cloud.pivot;
  const { points, colors, step } = cloud;
  for (let i = 0; i < points.length; i += 3) {
    const x = points[i] - px, y = points[i + 1] - py, z = points[i + 2] - pz;
    const rx = cy * x + sy * z, rz = cy * z - sy * x;
    const depth = -(sp * y + cp * rz + pz);
    if (depth <= 1e-6) continue;
    const scale = focal / depth;
    const size = Math.min(24, Math.ceil(1.25 * scale * step * -points[i + 2])); // as large as its pixel was, and a little larger against gaps
    const left = Math.round(width / 2 + scale * (rx + px) - size / 2);
    const top = Math.round(height / 2 - scale * (cp * y - sp * rz + py) - size / 2);
    const color = 0xff000000 | (colors[i + 2] << 16) | (colors[i + 1] << 8) | colors[i];
    for (let row = Math.max(0, top); row < Math.min(height, top + size); row++) {
      for (let at = row * width + Math.max(0, left); at < row * width + Math.min(width, left + size); at++) {
        if (depth < nearest[at]) [nearest[at], pixels[at]] = [depth, color];
      }
    }
  }
  context.putImageData(image, 0, 0);
}

function frame(now) {
  if (!element.isConnected) return;
  if (cloud && swaying && visible && grip === null) {
    began ??= now;
    yaw = 0.2 * Math.sin((now - began) / 1900);
    pitch = 0.06 * Math.sin((now - began) / 1300);
    draw();
  }
  requestAnimationFrame(frame);
}

canvas.addEventListener("pointerdown", (event) => {
  canvas.setPointerCapture(event.pointerId);
  [grip, swaying] = [{ x: event.clientX, y: event.clientY, yaw, pitch }, false];
});
canvas.addEventListener("pointermove", (event) => {
  if (grip === null) return;
  yaw = grip.yaw + (event.clientX - grip.x) / 200;
  pitch = Math.max(-1.5, Math.min(1.5, grip.pitch + (event.clientY - grip.y) / 200));
  draw();
});
for (const end of ["pointerup", "pointercancel"]) canvas.addEventListener(end, () => { grip = null; });
canvas.addEventListener("dblclick", () => { [yaw, pitch, swaying, began] = [0, 0, !still, null]; draw(); });
new IntersectionObserver((entries) => { visible = entries[entries.length - 1].isIntersecting; }).observe(canvas);
new ResizeObserver(draw).observe(canvas);
watch("value", load);
load();
requestAnimationFrame(frame);
