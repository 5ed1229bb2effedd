// The player and the plots of a report. One frame index moves everything: `show` draws it all at once.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("report-data").textContent);
  const byId = (id) => document.getElementById(id);
  const strategies = data.strategies;
  const state = { frame: 0, playing: false, speed: 1, zoom: 1, length: 1, hidden: new Set(), shown: null };
  const panels = [...document.querySelectorAll(".panel")].map(makePanel);
  const plots = [...document.querySelectorAll(".plot")].map(makePlot);

  // ---------------------------------------------------------------- videos

  function makePanel(figure, position, all) {
    const strategy = position - (all.length - strategies.length);
    const schedule = figure.querySelector(".schedule");
    return {
      figure, strategy, schedule,
      canvas: figure.querySelector(".video"),
      says: figure.querySelector(".step"),
      video: null, pictures: [], steps: null, maker: [], hover: null, row: null,
    };
  }

  // Load a picture; its pixels are ready to be drawn when the promise is fulfilled.
  async function load(address) {
    const image = new Image();
    image.src = address;
    await image.decode();
    return image;
  }

  const loaded = new Map();  // a video's sprites -> promise of its pictures, of what is shown alone

  function picturesOf(video) {
    if (!loaded.has(video)) loaded.set(video, Promise.all(video.pictures.map(load)));
    return loaded.get(video);
  }

  let choices = 0;

  // Show one sample of one video in all panels, once all their pictures are there.
  async function choose(sample) {
    const turn = ++choices;
    const videos = panels.map((panel) =>
      panel.strategy < 0 ? data.truth[sample.video] || null : sample.videos[panel.strategy]);
    const pictures = await Promise.all(videos.map((video) => (video ? picturesOf(video) : [])));
    if (turn !== choices) return;  // another one was chosen meanwhile
    for (const video of [...loaded.keys()]) if (!videos.includes(video)) loaded.delete(video);
    panels.forEach((panel, i) => {
      panel.video = videos[i];
      panel.pictures = pictures[i];
      const number = panel.strategy < 0 ? null : sample.schedules[panel.strategy];
      panel.steps = number === null ? null : data.schedules[number];
      panel.maker = makers(panel.steps);
      panel.hover = null;
      if (panel.video) {
        panel.canvas.width = panel.video.width;
        panel.canvas.height = panel.video.height;
      }
    });
    state.shown = sample;
    state.length = Math.max(1, ...videos.map((video) => (video ? video.length : 0)));
    byId("frame").max = state.length - 1;
    resize();
    show(Math.min(state.frame, state.length - 1));
    document.body.dataset.ready = `${sample.video}-${sample.sample}`;
  }

  // Of each frame the inference steps that made it; where there are several the last one counts.
  function makers(steps) {
    const found = [];
    (steps || []).forEach(([, latent], step) => latent.forEach((frame) => (found[frame] ||= []).push(step)));
    return found;
  }

  function isObserved(panel, frame) {
    const observed = panel.strategy < 0 ? strategies[0].observed : strategies[panel.strategy].observed;
    return observed.includes(frame);
  }

  function drawVideo(panel) {
    const { video, canvas } = panel, frame = state.frame;
    const context = canvas.getContext("2d", { willReadFrequently: true });
    const here = video !== null && frame < video.length;
    if (here) {
      const perPicture = video.columns * video.rows;
      const place = frame % perPicture;
      const x = (place % video.columns) * video.width, y = Math.floor(place / video.columns) * video.height;
      context.imageSmoothingEnabled = false;
      context.drawImage(panel.pictures[Math.floor(frame / perPicture)],
        x, y, video.width, video.height, 0, 0, video.width, video.height);
    } else {
      context.clearRect(0, 0, canvas.width, canvas.height);
    }
    canvas.classList.toggle("observed", here && isObserved(panel, frame));
    canvas.dataset.frame = frame;
  }

  function show(frame) {
    state.frame = frame;
    panels.forEach(drawVideo);
    panels.forEach(drawSchedule);
    plots.forEach(moveCursor);
    const slider = byId("frame");
    slider.value = frame;
    const observed = panels.length > 0 && isObserved(panels[panels.length - 1], frame);
    byId("position").value = `${frame} / ${state.length - 1}`;
    slider.setAttribute("aria-valuetext", `${frame} of 0 to ${state.length - 1}${observed ? ", observed" : ""}`);
  }

  // ---------------------------------------------------------------- the clock

  let began = { time: 0, frame: 0 };

  function restart() {
    began = { time: performance.now(), frame: state.frame };
  }

  function tick(now) {
    if (!state.playing) return;
    const passed = Math.max(0, Math.floor(((now - began.time) / 1000) * data.fps * state.speed));
    const frame = (began.frame + passed) % state.length;
    if (frame !== state.frame) show(frame);
    requestAnimationFrame(tick);
  }

  function play(playing) {
    state.playing = playing;
    byId("play").textContent = playing ? "Pause" : "Play";
    byId("play").setAttribute("aria-pressed", playing);
    restart();
    if (playing) requestAnimationFrame(tick);
  }

  function seek(frame) {
    show(Math.min(state.length - 1, Math.max(0, frame)));
    restart();
  }

  // ---------------------------------------------------------------- schedules

  // Dark blue over grey to yellow, as in the colour map cividis: for any colour vision.
  const EARLY_TO_LATE = [[0, 32, 77], [124, 123, 120], [255, 234, 70]];

  function stepColour(step, count) {
    const place = count > 1 ? (2 * step) / (count - 1) : 0;
    const left = Math.min(1, Math.floor(place));
    const mixed = EARLY_TO_LATE[left].map((value, i) =>
      Math.round(value + (place - left) * (EARLY_TO_LATE[left + 1][i] - value)));
    return `rgb(${mixed.join(",")})`;
  }

  const LANES = { together: 0, cells: 5, marks: 21, height: 30 };  // CSS pixels from the top

  // The part of a schedule's row that stays the same, drawn once.
  function scheduleRow(panel) {
    const scale = window.devicePixelRatio || 1;
    const row = document.createElement("canvas");
    row.width = Math.max(1, Math.round(panel.schedule.clientWidth * scale));
    row.height = LANES.height * scale;
    const context = row.getContext("2d"), cell = row.width / panel.video.length;
    const top = LANES.cells * scale, height = 14 * scale;
    const count = panel.steps ? panel.steps.length : 1;
    for (let frame = 0; frame < panel.video.length; frame++) {
      const made = panel.maker[frame], x = frame * cell;
      if (isObserved(panel, frame)) {
        context.fillStyle = "#d32f2f";
        context.fillRect(x, top, cell + 0.5, height);
      } else {
        context.fillStyle = made ? stepColour(made[made.length - 1], count) : "#dddddd";
        context.fillRect(x, top, cell + 0.5, height);
        const before = panel.maker[frame - 1];
        if (made && before && before[before.length - 1] !== made[made.length - 1]) {
          context.fillStyle = "#ffffff";  // steps are told apart by gaps, whatever their colours
          context.fillRect(x - scale / 2, top, scale, height);
        }
      }
    }
    hatch(context, panel, { cell, top, height, scale });
    return row;
  }

  function hatch(context, panel, { cell, top, height, scale }) {
    context.save();
    context.beginPath();
    for (let frame = 0; frame < panel.video.length; frame++)
      if (isObserved(panel, frame)) context.rect(frame * cell, top, cell, height);
    context.clip();
    context.strokeStyle = "rgba(255,255,255,.65)";
    context.lineWidth = scale;
    context.beginPath();
    for (let x = -height; x < panel.video.length * cell; x += 5 * scale) {
      context.moveTo(x, top + height);
      context.lineTo(x + height, top);
    }
    context.stroke();
    context.restore();
  }

  function drawSchedule(panel) {
    if (!panel.schedule || !panel.row) return;
    const canvas = panel.schedule, scale = window.devicePixelRatio || 1;
    const context = canvas.getContext("2d"), cell = canvas.width / panel.video.length;
    const frame = panel.hover === null ? state.frame : panel.hover;
    const made = panel.maker[frame];
    context.clearRect(0, 0, canvas.width, canvas.height);
    context.drawImage(panel.row, 0, 0);
    context.fillStyle = "#000000";
    if (made) {
      const [observed, latent] = panel.steps[made[made.length - 1]];
      for (const i of latent) context.fillRect(i * cell, LANES.together * scale, cell + 0.5, 3 * scale);
      for (const i of observed) context.fillRect(i * cell, LANES.marks * scale, Math.max(cell - scale, scale), 7 * scale);
    }
    const middle = (frame + 0.5) * cell;
    context.fillStyle = "#ffffff";
    context.fillRect(middle - 2 * scale, LANES.cells * scale - scale, 4 * scale, 16 * scale);
    context.fillStyle = "#000000";
    context.fillRect(middle - scale, LANES.cells * scale - scale, 2 * scale, 16 * scale);
    panel.says.textContent = scheduleWords(panel, frame, made);
  }

  function scheduleWords(panel, frame, made) {
    if (frame >= panel.video.length) return `Frame ${frame}: the video is over.`;
    if (isObserved(panel, frame)) return `Frame ${frame}: observed, from the data.`;
    if (!made) return `Frame ${frame}: the folder does not say which step made it.`;
    const step = made[made.length - 1], [observed, latent] = panel.steps[step];
    const before = made.length > 1 ? ` (before that in ${made.slice(0, -1).join(", ")})` : "";
    const from = observed.length ? `from ${ranges(observed)}` : "from nothing";
    return `Frame ${frame}: step ${step} of 0–${panel.steps.length - 1}${before} made ${ranges(latent)} ${from}.`;
  }

  // "3–7, 12" of 3 4 5 6 7 12.
  function ranges(frames) {
    const sorted = [...frames].sort((a, b) => a - b), parts = [];
    for (let i = 0, j; i < sorted.length; i = j) {
      for (j = i + 1; j < sorted.length && sorted[j] === sorted[j - 1] + 1; j++);
      parts.push(j - i > 1 ? `${sorted[i]}–${sorted[j - 1]}` : `${sorted[i]}`);
    }
    return parts.join(", ");
  }

  function frameAt(panel, event) {
    const box = panel.schedule.getBoundingClientRect();
    const frame = Math.floor(((event.clientX - box.left) / box.width) * panel.video.length);
    return Math.min(panel.video.length - 1, Math.max(0, frame));
  }

  function listenToSchedule(panel) {
    if (!panel.schedule) return;
    panel.schedule.addEventListener("pointermove", (event) => {
      if (!panel.video) return;
      panel.hover = frameAt(panel, event);
      drawSchedule(panel);
    });
    panel.schedule.addEventListener("pointerleave", () => {
      panel.hover = null;
      drawSchedule(panel);
    });
    panel.schedule.addEventListener("click", (event) => panel.video && seek(frameAt(panel, event)));
  }

  // ---------------------------------------------------------------- plots

  const SVG = "http://www.w3.org/2000/svg";
  const MARGIN = { left: 52, right: 10, top: 8, bottom: 34 }, PLOT_HEIGHT = 230;

  function element(name, attributes, parent) {
    const made = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    parent.append(made);
    return made;
  }

  function makePlot(figure) {
    return { figure, spec: data.plots[figure.dataset.plot], svg: null, scale: null, cursor: null };
  }

  // About `count` round numbers from low to high.
  function ticks(low, high, count) {
    const rough = (high - low) / count || 1, power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map((factor) => factor * power).find((value) => value >= rough);
    const found = [];
    for (let i = Math.ceil(low / step); i * step <= high + step * 1e-9; i++) found.push(i * step);
    return { found, digits: Math.max(0, -Math.floor(Math.log10(step) + 1e-9)) };
  }

  function range(spec) {
    const drawn = spec.curves.filter((curve) => !state.hidden.has(curve.strategy));
    const xs = drawn.flatMap((curve) => curve.x), ys = [];
    for (const curve of drawn)
      curve.mean.forEach((mean, i) => mean !== null && ys.push(mean - (curve.error[i] || 0), mean + (curve.error[i] || 0)));
    const least = Math.min(...ys), most = Math.max(...ys), pad = (most - least) * 0.04 || Math.abs(most) * 0.05 || 1;
    const last = Math.max(1, ...xs, ...(spec.by === "frame" ? [state.length - 1] : []));
    return ys.length ? { last, low: least - pad, high: most + pad } : { last, low: 0, high: 1 };
  }

  function drawPlot(plot) {
    const { figure, spec } = plot, width = Math.max(200, figure.clientWidth);
    if (plot.svg) plot.svg.remove();
    plot.svg = element("svg", { viewBox: `0 0 ${width} ${PLOT_HEIGHT}`, role: "img" }, figure);
    plot.svg.setAttribute("aria-label", `${spec.label} against the ${spec.by === "frame" ? "frame" : "inference step"}`);
    const { last, low, high } = range(spec), inner = width - MARGIN.left - MARGIN.right;
    const bottom = PLOT_HEIGHT - MARGIN.bottom;
    const x = (value) => MARGIN.left + (value / last) * inner;
    const y = (value) => bottom - ((value - low) / (high - low)) * (bottom - MARGIN.top);
    plot.scale = { x, y, frame: (pixel) => Math.round(((pixel - MARGIN.left) / inner) * last) };
    if (spec.by === "frame") shadeObserved(plot, bottom);
    const across = ticks(0, last, width / 90), up = ticks(low, high, 5);
    for (const value of up.found) {
      element("line", { x1: MARGIN.left, x2: width - MARGIN.right, y1: y(value), y2: y(value), stroke: "#e3e6ea" }, plot.svg);
      element("text", { x: MARGIN.left - 6, y: y(value) + 4, "text-anchor": "end" }, plot.svg).textContent = value.toFixed(up.digits);
    }
    for (const value of across.found.filter(Number.isInteger)) {
      element("line", { x1: x(value), x2: x(value), y1: bottom, y2: bottom + 4, stroke: "#8a94a3" }, plot.svg);
      element("text", { x: x(value), y: bottom + 16, "text-anchor": "middle" }, plot.svg).textContent = value;
    }
    element("line", { x1: MARGIN.left, x2: width - MARGIN.right, y1: bottom, y2: bottom, stroke: "#8a94a3" }, plot.svg);
    const name = spec.by === "frame" ? "frame" : "inference step";
    element("text", { x: width - MARGIN.right, y: bottom + 30, "text-anchor": "end" }, plot.svg).textContent = name;
    const drawn = spec.curves.filter((curve) => !state.hidden.has(curve.strategy));
    drawn.forEach((curve) => drawBand(plot, curve));
    drawn.forEach((curve) => drawCurve(plot, curve));
    plot.cursor = element("g", { class: "cursor" }, plot.svg);
    // Not "pointerdown": a finger that scrolls the page begins with one, too.
    plot.svg.addEventListener("click", (event) => {
      const box = plot.svg.getBoundingClientRect();
      if (spec.by === "frame" && panels.length) seek(plot.scale.frame(((event.clientX - box.left) / box.width) * width));
    });
    moveCursor(plot);
  }

  function shadeObserved(plot, bottom) {
    const observed = new Set(strategies[0].observed);
    for (const frame of observed)
      element("rect", { x: plot.scale.x(frame - 0.5), width: plot.scale.x(1) - plot.scale.x(0) + 0.3, y: MARGIN.top,
        height: bottom - MARGIN.top, fill: "#f0f2f5" }, plot.svg).classList.add("observed");
  }

  // The stretches of a curve without a gap, as lists of indices.
  function stretches(curve) {
    const found = [[]];
    curve.mean.forEach((mean, i) => {
      const apart = i > 0 && curve.x[i] !== curve.x[i - 1] + 1;
      if ((mean === null || apart) && found[found.length - 1].length) found.push([]);
      if (mean !== null) found[found.length - 1].push(i);
    });
    return found.filter((stretch) => stretch.length);
  }

  function drawBand(plot, curve) {
    const { x, y } = plot.scale;
    for (const stretch of stretches(curve)) {
      const edge = (sign) => stretch.map((i) => `${x(curve.x[i]).toFixed(1)},${y(curve.mean[i] + sign * (curve.error[i] || 0)).toFixed(1)}`);
      const points = [...edge(1), ...edge(-1).reverse()].join(" ");
      element("polygon", { points, fill: strategies[curve.strategy].colour, "fill-opacity": 0.13 }, plot.svg);
    }
  }

  function drawCurve(plot, curve) {
    const { x, y } = plot.scale, { colour, dashes } = strategies[curve.strategy];
    for (const stretch of stretches(curve)) {
      const points = stretch.map((i) => `${x(curve.x[i]).toFixed(1)},${y(curve.mean[i]).toFixed(1)}`).join(" ");
      if (stretch.length === 1) {
        const [cx, cy] = points.split(",");
        element("circle", { cx, cy, r: 2.5, fill: colour }, plot.svg);
      }
      element("polyline", { points, fill: "none", stroke: colour, "stroke-width": 1.8,
        "stroke-dasharray": dashes.map((length) => 1.8 * length).join(" ") }, plot.svg);
    }
  }

  function moveCursor(plot) {
    if (!plot.cursor) return;
    plot.cursor.replaceChildren();
    const { x, y } = plot.scale;
    if (plot.spec.by === "frame") {
      const at = x(state.frame), bottom = PLOT_HEIGHT - MARGIN.bottom;
      element("line", { x1: at, x2: at, y1: MARGIN.top, y2: bottom, stroke: "#000", "stroke-width": 1 }, plot.cursor);
    }
    for (const curve of plot.spec.curves.filter(({ strategy }) => !state.hidden.has(strategy))) {
      const value = plot.spec.by === "frame" ? state.frame : stepNow(curve.strategy);
      const i = curve.x.indexOf(value);
      if (i < 0 || curve.mean[i] === null) continue;
      element("circle", { cx: x(value), cy: y(curve.mean[i]), r: 4, fill: strategies[curve.strategy].colour, stroke: "#fff" }, plot.cursor);
    }
    plot.svg.dataset.cursor = state.frame;
  }

  // The inference step of a strategy that made the current frame; -1 where none did.
  function stepNow(strategy) {
    const panel = panels.find((one) => one.strategy === strategy), made = panel && panel.maker[state.frame];
    return made ? made[made.length - 1] : -1;
  }

  // ---------------------------------------------------------------- sizes

  function setZoom(zoom) {
    state.zoom = Math.min(16, Math.max(1, zoom));
    resize();
    show(state.frame);
  }

  // The whole factor by which all videos stand in one row, or, where they would be too small, two on a phone.
  function fittingZoom() {
    const width = Math.max(...panels.map((panel) => (panel.video ? panel.video.width : 1)));
    const all = document.querySelector(".panels").clientWidth, gap = 16, border = 8;
    const inOneRow = (all - gap * (panels.length - 1)) / panels.length - border;
    const room = Math.min(200, inOneRow >= 120 ? inOneRow : (all - gap) / 2 - border);
    return Math.max(1, Math.floor(room / width));
  }

  function resize() {
    for (const panel of panels)
      if (panel.video) panel.figure.style.setProperty("--video-width", `${panel.video.width * state.zoom}px`);
    const widest = Math.max(...panels.map((panel) => (panel.video ? panel.video.width : 1))) * state.zoom;
    document.querySelector(".panels").style.setProperty("--widest", `${widest}px`);
    byId("zoom").value = `${state.zoom}×`;
    const scale = window.devicePixelRatio || 1;
    for (const panel of panels) {
      if (!panel.schedule || !panel.video) continue;
      panel.schedule.width = Math.max(1, Math.round(panel.schedule.clientWidth * scale));
      panel.schedule.height = LANES.height * scale;
      panel.row = scheduleRow(panel);
      drawSchedule(panel);
    }
  }

  // ---------------------------------------------------------------- controls

  function fill(select, values) {
    const chosen = Number(select.value);
    select.replaceChildren(...values.map((value) => new Option(value, value)));
    select.value = values.includes(chosen) ? chosen : values[0];
  }

  function chooseAgain() {
    const video = Number(byId("video").value);
    const samples = data.samples.filter((one) => one.video === video);
    fill(byId("sample"), samples.map((one) => one.sample));
    return choose(samples.find((one) => one.sample === Number(byId("sample").value)));
  }

  function changeSpeed(by) {
    const select = byId("speed");
    select.selectedIndex = Math.min(select.options.length - 1, Math.max(0, select.selectedIndex + by));
    select.dispatchEvent(new Event("change"));
  }

  const KEYS = {
    " ": () => play(!state.playing),
    ArrowLeft: (event) => seek(state.frame - (event.shiftKey ? 10 : 1)),
    ArrowRight: (event) => seek(state.frame + (event.shiftKey ? 10 : 1)),
    Home: () => seek(0),
    End: () => seek(state.length - 1),
    "<": () => changeSpeed(-1),
    ">": () => changeSpeed(1),
    "+": () => setZoom(state.zoom + 1),
    "-": () => setZoom(state.zoom - 1),
  };

  // Whether what has the focus does something of its own with the key. A click leaves the focus behind, so
  // controls keep no more keys than they need.
  function isTaken(within, event) {
    if (within.id === "frame") return !event.shiftKey && ["ArrowLeft", "ArrowRight", "Home", "End"].includes(event.key);
    if (within.matches("button, summary, [type=checkbox]")) return event.key === " " || event.key === "Enter";
    return true;
  }

  function onKey(event) {
    const within = event.target.closest("input, select, button, summary, .wide");
    if (event.ctrlKey || event.altKey || event.metaKey || !(event.key in KEYS)) return;
    if (within && isTaken(within, event)) return;
    event.preventDefault();
    KEYS[event.key](event);
  }

  function listen() {
    byId("play").addEventListener("click", () => play(!state.playing));
    byId("frame").addEventListener("input", (event) => seek(Number(event.target.value)));
    byId("speed").addEventListener("change", (event) => {
      state.speed = Number(event.target.value);
      restart();
    });
    byId("video").addEventListener("change", chooseAgain);
    byId("sample").addEventListener("change", chooseAgain);
    byId("larger").addEventListener("click", () => setZoom(state.zoom + 1));
    byId("smaller").addEventListener("click", () => setZoom(state.zoom - 1));
    panels.forEach(listenToSchedule);
    document.addEventListener("keydown", onKey);
  }

  function redraw() {
    if (panels.length) resize();
    plots.forEach(drawPlot);
  }

  async function start() {
    const baseline = byId("baseline");
    if (baseline) baseline.addEventListener("change", () =>
      document.querySelectorAll(".difference").forEach((table, i) => { table.hidden = i !== Number(baseline.value); }));
    for (const box of document.querySelectorAll(".legend input"))
      box.addEventListener("change", () => {
        state.hidden[box.checked ? "delete" : "add"](Number(box.dataset.strategy));
        plots.forEach(drawPlot);
      });
    window.addEventListener("resize", redraw);
    if (panels.length) {
      listen();
      fill(byId("video"), [...new Set(data.samples.map((one) => one.video))]);
      await chooseAgain();
      setZoom(fittingZoom());
    }
    plots.forEach(drawPlot);
    document.body.dataset.started = "yes";
  }

  start();
})();
