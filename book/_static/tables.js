// A table that is wider than its frame is shown as a list: one block a row, each value after the
// name of its column. Where scripts do not run the frame scrolls instead.
(() => {
  "use strict";

  const NUMBERS = /^[-−+±×·≈<>≤≥~()[\]\d\s.,:;/%eE–]*$/;

  // What a screen reader calls the parts, which `display: block` takes from it.
  const ROLES = { table: "table", thead: "rowgroup", tbody: "rowgroup", tr: "row", td: "cell" };

  function prepare(table) {
    const names = [];
    for (const row of table.tHead ? table.tHead.rows : []) {
      let column = 0;
      for (const cell of row.cells) {
        for (let span = cell.colSpan; span > 0; span--, column++) {
          const name = cell.textContent.trim();
          names[column] = [names[column], name].filter(Boolean).join(", ");
        }
      }
    }
    for (const body of table.tBodies) {
      for (const row of body.rows) {
        [...row.cells].forEach((cell, place) => {
          const text = cell.textContent.trim();
          if (names[place]) cell.dataset.column = names[place];
          if (NUMBERS.test(text)) cell.classList.add("number");
          else if (text.length > 24) cell.classList.add("words");
        });
      }
    }
  }

  function name(table, stacked) {
    for (const part of [table, ...table.querySelectorAll("thead, tbody, tr, td, th")]) {
      const kind = part.tagName.toLowerCase();
      const role = kind !== "th" ? ROLES[kind] : part.closest("thead") ? "columnheader" : "rowheader";
      if (stacked) part.setAttribute("role", role);
      else part.removeAttribute("role");
    }
  }

  function fit(table, frame) {
    const before = table.classList.contains("stacked");
    table.classList.remove("stacked");
    const stacked = table.offsetWidth > frame.clientWidth + 1 && table.tHead !== null;
    table.classList.toggle("stacked", stacked);
    if (stacked !== before) name(table, stacked);
  }

  document.addEventListener("DOMContentLoaded", () => {
    const tables = [...document.querySelectorAll(".bd-article table")].filter(
      (table) => !table.closest(".msif-explorer"),
    );
    const widths = new Map();
    const observer = new ResizeObserver((entries) => {
      for (const { target } of entries) {
        if (widths.get(target) === target.clientWidth) continue;
        widths.set(target, target.clientWidth);
        for (const table of target.querySelectorAll(":scope > table")) fit(table, target);
      }
    });
    for (const table of tables) {
      prepare(table);
      observer.observe(table.parentElement); // also when it is unfolded
    }
    const again = () => tables.forEach((table) => fit(table, table.parentElement));
    if (window.MathJax && MathJax.startup) MathJax.startup.promise.then(again);
    document.fonts.ready.then(again);
  });
})();
