// Line charts over time. All charts and the band share one view, so their crosshairs show the same time.

const chartLeft = 52;
const chartTop = 8;
const chartFoot = 22;
const longestGap = 15; // seconds without data that a line may span

class Chart {
  // lines: [{name, column, color: () => css, fill}]; scale: "linear" | "log" | "share"
  constructor(card, view, { lines, scale, format, axis }) {
    Object.assign(this, { view, lines, scale, format, axis: axis || format, event: null });
    const legend = element("div", { className: "legend" });
    this.legend = lines.map((line) => {
      const value = element("b");
      const mark = swatch("");
      legend.append(element("span", {}, mark, `${line.name} `, value));
      return { value, mark };
    });
    const canvas = element("canvas");
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", card.querySelector("h2").textContent);
    card.querySelector(".title").append(legend);
    card.append(canvas);
    this.surface = new Surface(canvas);
    canvas.addEventListener("pointermove", (event) => {
      const share = (event.offsetX - chartLeft) / (this.surface.width - chartLeft);
      this.event = event;
      view.hover = view.start + Math.min(1, Math.max(0, share)) * view.seconds;
    });
    canvas.addEventListener("pointerleave", () => {
      this.event = view.hover = null;
      tip.hide();
    });
  }

  draw(store) {
    const context = this.surface.clear();
    const points = store.series.filter((point) => point.time > this.view.start - 2 * store.points.width);
    this.fitScale(points);
    this.drawGrid(context);
    context.save();
    context.beginPath();
    context.rect(chartLeft, 0, this.surface.width - chartLeft, this.surface.height);
    context.clip();
    for (const line of this.lines.toReversed()) this.drawLine(context, line, points, store.points.width);
    context.restore();
    const chosen = this.pointAt(points, store.points.width);
    if (this.view.hover !== null && chosen) this.drawCrosshair(context, chosen);
    this.explain(chosen);
  }

  fitScale(points) {
    const values = points.flatMap((point) => this.lines.map((line) => point[line.column])).filter((value) => value > 0);
    if (this.scale === "log") {
      this.low = 10 ** Math.floor(Math.log10(Math.min(0.01, ...values)) + 1e-9);
      this.high = Math.max(this.low * 100, 10 ** Math.ceil(Math.log10(Math.max(0.1, ...values)) - 1e-9));
      return;
    }
    this.low = 0;
    this.high = this.scale === "share" ? 1 : niceAbove(Math.max(0, ...values));
  }

  x(time) {
    return chartLeft + ((time - this.view.start) / this.view.seconds) * (this.surface.width - chartLeft);
  }

  y(value) {
    const height = this.surface.height - chartTop - chartFoot;
    const share = this.scale === "log"
      ? Math.log(Math.max(value, this.low) / this.low) / Math.log(this.high / this.low)
      : (value - this.low) / (this.high - this.low);
    return chartTop + height * (1 - share);
  }

  ticks() {
    if (this.scale !== "log") return [0, 0.25, 0.5, 0.75, 1].map((share) => this.high * share);
    const decades = Math.round(Math.log10(this.high / this.low));
    return Array.from({ length: decades + 1 }, (_, power) => this.low * 10 ** power);
  }

  drawGrid(context) {
    for (const tick of this.ticks()) {
      const y = Math.round(this.y(tick)) + 0.5;
      context.strokeStyle = colors.grid;
      context.beginPath();
      context.moveTo(chartLeft, y);
      context.lineTo(this.surface.width, y);
      context.stroke();
      drawText(context, this.axis(tick), chartLeft - 8, y, "right");
    }
    drawTimeAxis(context, this.view, chartLeft, this.surface.width, this.surface.height - 8);
  }

  drawLine(context, line, points, width) {
    const known = points.filter((point) => point[line.column] !== null);
    context.strokeStyle = context.fillStyle = line.color();
    context.lineWidth = 1.75;
    context.lineJoin = "round";
    for (const run of runsOf(known, Math.max(longestGap, 2 * width))) {
      context.beginPath();
      run.forEach((point) => context.lineTo(this.x(point.time), this.y(point[line.column])));
      if (run.length === 1) context.arc(this.x(run[0].time), this.y(run[0][line.column]), 1, 0, 7);
      context.stroke();
      if (line.fill) this.fillBelow(context, run);
    }
    context.lineWidth = 1;
  }

  fillBelow(context, run) {
    context.lineTo(this.x(run.at(-1).time), this.y(this.low));
    context.lineTo(this.x(run[0].time), this.y(this.low));
    context.globalAlpha = 0.13;
    context.fill();
    context.globalAlpha = 1;
  }

  pointAt(points, width) {
    if (this.view.hover === null) return points.at(-1);
    const near = points.filter((point) => Math.abs(point.time - this.view.hover) <= width);
    return near.sort((a, b) => Math.abs(a.time - this.view.hover) - Math.abs(b.time - this.view.hover))[0];
  }

  drawCrosshair(context, point) {
    const x = Math.round(this.x(this.view.hover)) + 0.5;
    context.strokeStyle = colors.faint;
    context.beginPath();
    context.moveTo(x, chartTop);
    context.lineTo(x, this.surface.height - chartFoot);
    context.stroke();
    for (const line of this.lines) {
      if (point[line.column] === null) continue;
      context.fillStyle = line.color();
      context.beginPath();
      context.arc(this.x(point.time), this.y(point[line.column]), 3, 0, 7);
      context.fill();
    }
  }

  explain(point) {
    this.lines.forEach((line, number) => {
      this.legend[number].mark.style.background = line.color();
      this.legend[number].value.textContent = point ? this.format(point[line.column]) : missing;
    });
    if (!this.event) return;
    const head = formats.ago(this.view.end - this.view.hover);
    if (!point) tip.show(this.event, head, [[null, "no data", ""]]);
    else tip.show(this.event, head, this.lines.map((line) => [line.color(), line.name, this.format(point[line.column])]));
  }
}

function runsOf(points, gap) {
  const runs = [];
  for (const point of points) {
    const run = runs.at(-1);
    if (run && point.time - run.at(-1).time <= gap) run.push(point);
    else runs.push([point]);
  }
  return runs;
}

// A round number of at least `value` whose quarters are also round.
function niceAbove(value) {
  const quarter = Math.max(1, (value * 1.04) / 4);
  const power = 10 ** Math.floor(Math.log10(quarter));
  return 4 * power * [1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10].find((digit) => digit * power >= quarter && (digit * power) % 1 === 0);
}

function percentileLines(column) {
  return [
    { name: "p50", column: `${column}_p50`, color: () => colors.one },
    { name: "p90", column: `${column}_p90`, color: () => colors.two },
    { name: "p99", column: `${column}_p99`, color: () => colors.four },
  ];
}

function makeCharts(view) {
  const chart = (name, options) => new Chart(byId(`chart-${name}`), view, options);
  const short = (value) => formats.short(value);
  return [
    chart("tokens", {
      scale: "linear", format: formats.rate, axis: short,
      lines: [
        { name: "prompt", column: "prompt", color: () => colors.three, fill: true },
        { name: "generated", column: "generated", color: () => colors.two, fill: true },
      ],
    }),
    chart("requests", {
      scale: "linear", format: formats.count, axis: short,
      lines: [
        { name: "running", column: "running", color: () => colors.one, fill: true },
        { name: "waiting", column: "waiting", color: () => colors.four },
      ],
    }),
    chart("cache", {
      scale: "share", format: formats.share,
      lines: [
        { name: "in use", column: "kv_cache_usage", color: () => colors.one, fill: true },
        { name: "prefix hits", column: "prefix_hit_rate", color: () => colors.two },
      ],
    }),
    chart("drafts", {
      scale: "linear", format: formats.rate, axis: short,
      lines: [
        { name: "drafted per step", column: "drafted", color: () => colors.three, fill: true },
        { name: "output per step", column: "step_output", color: () => colors.two },
      ],
    }),
    chart("first-token", { scale: "log", format: formats.brief, axis: formats.duration, lines: percentileLines("first_token") }),
    chart("inter-token", { scale: "log", format: formats.brief, axis: formats.duration, lines: percentileLines("inter_token") }),
  ];
}
