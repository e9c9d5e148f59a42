// The band of modes over time, and bars of the most recent steps by number of tokens.

const bandTop = 2;
const bandFoot = 22;

class Band {
  constructor(canvas, view) {
    this.surface = new Surface(canvas);
    this.view = view;
    this.event = null;
    canvas.addEventListener("pointermove", (event) => {
      this.event = event;
      view.hover = view.start + (event.offsetX / this.surface.width) * view.seconds;
    });
    canvas.addEventListener("pointerleave", () => {
      this.event = view.hover = null;
      tip.hide();
    });
  }

  draw(store) {
    const { surface, view } = this;
    const context = surface.clear();
    const height = surface.height - bandTop - bandFoot;
    context.fillStyle = colors.well;
    context.beginPath();
    context.roundRect(0, bandTop, surface.width, height, 6);
    context.fill();
    context.save();
    context.clip();
    for (const row of store.band.rows.values()) this.drawRow(context, store, row, height);
    context.restore();
    drawTimeAxis(context, view, 0, surface.width, surface.height - 8);
    if (view.hover !== null) this.drawHover(context, height);
    if (this.event) this.explain(store);
  }

  drawRow(context, store, row, height) {
    const width = store.band.width;
    const left = Math.round(this.x(row[0] * width));
    const right = Math.max(left + 1, Math.round(this.x((row[0] + 1) * width)));
    if (right < 0 || left > this.surface.width) return;
    const seconds = row.slice(4);
    const busy = seconds.reduce((sum, each) => sum + each, 0);
    let before = 0;
    for (let mode = 0; mode < seconds.length && busy > 0; mode += 1) {
      if (!seconds[mode]) continue;
      const y = bandTop + Math.round((height * before) / busy);
      context.fillStyle = colors.ofMode(store.data.modes, mode);
      context.fillRect(left, y, right - left, bandTop + height - y);
      before += seconds[mode];
    }
  }

  x(time) {
    return ((time - this.view.start) / this.view.seconds) * this.surface.width;
  }

  drawHover(context, height) {
    const x = Math.round(this.x(this.view.hover)) + 0.5;
    context.strokeStyle = colors.text;
    context.globalAlpha = 0.5;
    context.beginPath();
    context.moveTo(x, bandTop);
    context.lineTo(x, bandTop + height);
    context.stroke();
    context.globalAlpha = 1;
  }

  explain(store) {
    const row = store.band.rows.get(Math.floor(this.view.hover / store.band.width));
    const head = formats.ago(this.view.end - this.view.hover);
    if (!row) return tip.show(this.event, head, [[null, "idle", ""]]);
    const seconds = row.slice(4);
    const busy = seconds.reduce((sum, each) => sum + each, 0) || 1;
    const lines = seconds.flatMap((each, mode) =>
      each ? [[colors.ofMode(store.data.modes, mode), store.data.modes[mode].name, formats.share(each / busy)]] : []);
    const counts = [["steps ended", row[1]], ["tokens", row[2]], ["decode tokens", row[3]]];
    return tip.show(this.event, head, [...lines, ...counts.map(([name, value]) => [null, name, formats.count(value)])]);
  }
}

const barPitch = 5;
const stepsLeft = 40;
const stepsFoot = 4;

class StepBars {
  constructor(canvas) {
    this.surface = new Surface(canvas);
    this.event = null;
    canvas.addEventListener("pointermove", (event) => { this.event = event; });
    canvas.addEventListener("pointerleave", () => {
      this.event = null;
      tip.hide();
    });
  }

  draw(store) {
    const { surface } = this;
    const context = surface.clear();
    const fitting = Math.max(1, Math.floor((surface.width - stepsLeft) / barPitch));
    const steps = store.steps.slice(-fitting);
    const policy = store.data.state ? store.data.state.policy : {};
    const threshold = policy.name === "threshold" ? policy.threshold_tokens : null;
    const most = steps.reduce((top, step) => Math.max(top, step[4]), Math.max(32, (threshold || 0) * 2));
    this.scale = (surface.height - stepsFoot - 8) / Math.log2(1 + most);
    this.drawGrid(context, most);
    steps.forEach((step, place) => {
      const height = Math.max(2, this.scale * Math.log2(1 + step[4]));
      const x = surface.width - (steps.length - place) * barPitch;
      context.globalAlpha = this.event && this.placeOf(steps) !== place ? 0.55 : 1;
      context.fillStyle = colors.ofMode(store.data.modes, step[3]);
      context.beginPath();
      context.roundRect(x, surface.height - stepsFoot - height, barPitch - 1.5, height, [1.5, 1.5, 0, 0]);
      context.fill();
    });
    context.globalAlpha = 1;
    if (threshold) this.drawThreshold(context, threshold);
    if (this.event) this.explain(store, steps);
  }

  y(tokens) {
    return this.surface.height - stepsFoot - this.scale * Math.log2(1 + tokens);
  }

  drawGrid(context, most) {
    for (let tokens = 1; tokens <= most; tokens *= most > 300 ? 8 : 4) {
      const y = Math.round(this.y(tokens)) + 0.5;
      context.strokeStyle = colors.grid;
      context.beginPath();
      context.moveTo(stepsLeft, y);
      context.lineTo(this.surface.width, y);
      context.stroke();
      drawText(context, formats.short(tokens), stepsLeft - 8, y, "right");
    }
  }

  drawThreshold(context, threshold) {
    const y = Math.round(this.y(threshold)) + 0.5;
    context.strokeStyle = colors.text;
    context.globalAlpha = 0.75;
    context.setLineDash([5, 4]);
    context.beginPath();
    context.moveTo(stepsLeft, y);
    context.lineTo(this.surface.width, y);
    context.stroke();
    context.setLineDash([]);
    context.globalAlpha = 1;
    const label = `threshold ${formats.count(threshold)}`;
    context.fillStyle = colors.card;
    context.fillRect(stepsLeft + 4, y - 18, context.measureText(label).width + 8, 14);
    drawText(context, label, stepsLeft + 8, y - 10, "left", colors.text);
  }

  placeOf(steps) {
    return steps.length - 1 - Math.floor((this.surface.width - this.event.offsetX) / barPitch);
  }

  explain(store, steps) {
    const step = steps[this.placeOf(steps)];
    if (!step) return tip.hide();
    const [sequence, , seconds, mode, tokens, decodes] = step;
    return tip.show(this.event, `step ${formats.count(sequence)}`, [
      [colors.ofMode(store.data.modes, mode), store.data.modes[mode].name, formats.duration(seconds)],
      [null, "prefill tokens", formats.count(tokens - decodes)],
      [null, "decode tokens", formats.count(decodes)],
    ]);
  }
}
