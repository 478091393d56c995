// Fetches the page again and replaces the main part of the document.
(() => {
  "use strict";
  const every = Number(document.body.dataset.refresh) * 1000;
  const main = document.getElementById("page");
  const age = document.getElementById("age");
  const stale = document.getElementById("stale");
  let readAt = Date.now();
  let failure = "";
  let waiting = false;
  let asking = false;
  let timer = 0;

  function show() {
    const seconds = Math.round((Date.now() - readAt) / 1000);
    age.textContent = `, ${seconds} s ago`;
    const old = failure !== "" || seconds * 1000 > 3 * every + 1000;
    document.body.classList.toggle("old", old);
    if (old) {
      const reason = failure || (waiting ? "text in it is selected" : "no answer yet");
      stale.textContent =
        `This page is ${seconds} s old: it could not be refreshed (${reason}). It keeps trying.`;
    }
    stale.hidden = !old;
  }

  function isBeingSelected() {
    const selection = getSelection();
    return !selection.isCollapsed && main.contains(selection.anchorNode);
  }

  function swap(next) {
    const kept = "[data-keep]";
    const open = new Set();
    let focused = null;
    for (const each of main.querySelectorAll(kept)) {
      if (each.open) open.add(each.dataset.keep);
      if (each.contains(document.activeElement)) focused = each.dataset.keep;
    }
    const [x, y] = [scrollX, scrollY];
    main.replaceChildren(...next.getElementById("page").childNodes);
    for (const each of main.querySelectorAll(kept)) {
      each.open = open.has(each.dataset.keep);
      if (each.dataset.keep === focused) {
        each.querySelector("summary").focus({preventScroll: true});
      }
    }
    scrollTo(x, y);
    document.title = next.title;
    document.getElementById("read").replaceWith(next.getElementById("read"));
  }

  async function refresh() {
    clearTimeout(timer);
    if (asking) return;
    asking = true;
    try {
      const signal = AbortSignal.timeout(Math.max(2 * every, 10000));
      const answer = await fetch(location.href, {cache: "no-store", signal});
      const next = new DOMParser().parseFromString(await answer.text(), "text/html");
      if (!next.getElementById("page")) throw new Error(`the exporter answered ${answer.status}`);
      failure = "";
      waiting = isBeingSelected();
      if (!waiting) {
        swap(next);
        readAt = Date.now();
      }
    } catch (error) {
      failure = error.name === "TimeoutError" ? "no answer in time" : error.message;
    }
    asking = false;
    show();
    timer = setTimeout(refresh, every);
  }

  document.addEventListener("visibilitychange", () => {
    if (!document.hidden) refresh();
  });
  setInterval(show, 1000);
  timer = setTimeout(refresh, every);
})();
