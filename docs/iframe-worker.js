// The search runs in a worker. Browsers start none for pages that are opened from disk: there, a hidden frame of the
// page runs the worker's script in its place. Material's search asks for it by the name IFrameWorker.
"use strict";

class FrameWorker extends EventTarget {
  constructor(url) {
    super();
    this.frame = document.createElement("iframe");
    this.frame.hidden = true;
    document.body.append(this.frame);
    const inner = this.frame.contentWindow;
    const load = (source) =>
      new Promise((loaded, failed) => {
        const script = inner.document.createElement("script");
        Object.assign(script, { src: source, onload: loaded, onerror: failed });
        inner.document.body.append(script);
      });
    inner.importScripts = async (...sources) => {
      for (const source of sources) await load(source);
    };
    inner.postMessage = (data) => queueMicrotask(() => this.receive(structuredClone(data)));
    this.ready = load(url);
  }

  receive(data) {
    const event = new MessageEvent("message", { data });
    this.dispatchEvent(event);
    if (this.onmessage) this.onmessage(event);
  }

  postMessage(data) {
    const copy = structuredClone(data);
    const inner = this.frame.contentWindow;
    this.ready.then(() => inner.dispatchEvent(new MessageEvent("message", { data: copy })));
  }

  terminate() {
    this.frame.remove();
  }
}

window.IFrameWorker = FrameWorker;
if (location.protocol === "file:") window.Worker = FrameWorker;
