// Sorts and filters the tables of all trials. Everything is in the page: nothing is fetched.
"use strict";
(() => {
  const PAGE = 100;

  async function unpack(text) {
    const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return JSON.parse(await new Response(stream).text());
  }

  function compare(a, b, sign) {
    if (a === null || b === null) return (a === null) - (b === null); // empty cells last, both ways
    if (typeof a === "number" && typeof b === "number") return sign * (a - b);
    return sign * String(a).localeCompare(String(b), "en", { numeric: true });
  }

  async function start(section) {
    const all = await unpack(section.querySelector("script[type='text/plain']").textContent.trim());
    const body = section.querySelector("tbody");
    const heads = [...section.querySelectorAll("thead th")];
    const filter = section.querySelector("input[type=search]");
    const count = section.querySelector("[data-count]");
    const more = section.querySelector("button[data-more]");
    let shown = all, limit = PAGE;

    function draw() {
      const rows = shown.slice(0, limit).map((row) => {
        const line = document.createElement("tr");
        row.forEach((value, place) => {
          const cell = document.createElement("td");
          cell.textContent = value === null ? "" : value;
          if (heads[place].dataset.kind === "number") cell.className = "number";
          line.append(cell);
        });
        return line;
      });
      body.replaceChildren(...rows);
      count.textContent = `${shown.length.toLocaleString("en")} of ${all.length.toLocaleString("en")} trials`;
      more.hidden = shown.length <= limit;
      more.textContent = `show ${Math.min(PAGE * 10, shown.length - limit)} more`;
    }

    // `linear probe > 0.9`, `topk.mode:add` and `state = finished` look at one column; other words at all of them.
    const columns = new Map();
    heads.forEach((head, place) => [head.dataset.name.replace(/^config\./, ""), head.dataset.title].forEach((name) => {
      columns.set(name.toLowerCase(), place);
    }));
    const names = [...columns.keys()].sort((a, b) => b.length - a.length)
      .map((name) => name.replace(/[.*+?^${}()|[\]\\]/g, "\\$&")).join("|");
    const asked = new RegExp(`(^|\\s)(${names})\\s*(<=|>=|<|>|=|:)\\s*(\\S+)`, "g");

    function test(place, operator, wanted) {
      const number = Number(wanted);
      const equal = (v) => (typeof v === "number" ? v === number : String(v).toLowerCase() === wanted);
      const tell = {
        "<": (v) => v < number, ">": (v) => v > number, "<=": (v) => v <= number, ">=": (v) => v >= number,
        "=": equal, ":": (v) => String(v).toLowerCase().includes(wanted),
      }[operator];
      return (row) => row[place] !== null && tell(row[place]);
    }

    function select() {
      const tests = [];
      const rest = filter.value.toLowerCase().replace(asked, (_, before, name, operator, wanted) => {
        tests.push(test(columns.get(name), operator, wanted));
        return " ";
      });
      rest.split(/\s+/).filter(Boolean).forEach((word) => {
        tests.push((row) => row.some((v) => v !== null && String(v).toLowerCase().includes(word)));
      });
      shown = all.filter((row) => tests.every((test) => test(row)));
      const sorted = heads.findIndex((h) => h.ariaSort && h.ariaSort !== "none");
      if (sorted >= 0) sort(sorted);
      limit = PAGE;
      draw();
    }

    function sort(place) {
      const sign = heads[place].ariaSort === "descending" ? -1 : 1;
      shown = [...shown].sort((a, b) => compare(a[place], b[place], sign));
    }

    heads.forEach((head, place) => head.querySelector("button").addEventListener("click", () => {
      const next = head.ariaSort === "ascending" ? "descending" : "ascending";
      heads.forEach((h) => { h.ariaSort = "none"; });
      head.ariaSort = next;
      sort(place);
      draw();
    }));
    filter.addEventListener("input", select);
    more.addEventListener("click", () => { limit += PAGE * 10; draw(); });
    section.classList.add("live");
    draw();
  }

  document.querySelectorAll("[data-trials]").forEach((section) => start(section).catch((error) => {
    section.querySelector("[data-count]").textContent = `the best ${section.querySelectorAll("tbody tr").length} trials ` +
      `(this browser cannot show the others: ${error.message})`;
  }));
})();
