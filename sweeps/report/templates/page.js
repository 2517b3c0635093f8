"use strict";
const tip = document.getElementById("tip");
const withTip = node => node.closest && node.closest("[data-tip]");
function show(mark, x, y) {
  tip.textContent = mark.dataset.tip;
  const box = tip.getBoundingClientRect();
  tip.style.left = Math.max(4, Math.min(x + 12, innerWidth - box.width - 4)) + "px";
  tip.style.top = (y + 18 + box.height > innerHeight ? y - box.height - 10 : y + 18) + "px";
  tip.style.visibility = "visible";
}
const hide = () => { tip.style.visibility = "hidden"; };
addEventListener("pointermove", event => { const mark = withTip(event.target); mark ? show(mark, event.clientX, event.clientY) : hide(); });
addEventListener("pointerdown", event => { const mark = withTip(event.target); if (mark) show(mark, event.clientX, event.clientY); });
addEventListener("focusin", event => { const mark = withTip(event.target); if (mark) { const box = mark.getBoundingClientRect(); show(mark, box.right, box.top); } });
addEventListener("focusout", hide);
addEventListener("scroll", hide, { passive: true });
addEventListener("beforeprint", () => document.querySelectorAll("#samples details").forEach(part => { part.open = true; }));
