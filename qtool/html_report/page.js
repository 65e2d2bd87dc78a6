// The titles of marks are shown at once and beside the pointer. Without this script the browser shows them, later.
const tip = document.getElementById("tip");
function show(event) {
  const mark = event.target.closest ? event.target.closest(".mark") : null;
  if (!mark) { tip.style.visibility = "hidden"; return; }
  const title = mark.querySelector("title");
  if (title) { mark.tip = title.textContent; title.remove(); }
  tip.textContent = mark.tip;
  const width = tip.offsetWidth, height = tip.offsetHeight;
  const left = Math.min(event.clientX + 14, document.documentElement.clientWidth - width - 8);
  const above = event.clientY - height - 12;
  tip.style.left = Math.max(left, 8) + "px";
  tip.style.top = (above < 8 ? event.clientY + 18 : above) + "px";
  tip.style.visibility = "visible";
}
document.addEventListener("pointermove", show);
document.addEventListener("pointerdown", show);
document.addEventListener("scroll", () => { tip.style.visibility = "hidden"; }, true);
