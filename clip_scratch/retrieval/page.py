"""The search page: a Gradio interface on a FastAPI application that serves pictures of indexed images, nothing else."""

from __future__ import annotations

import functools
import html
import io
from pathlib import Path
from urllib.parse import quote

import gradio as gr
import numpy as np
from fastapi import FastAPI, HTTPException, Response
from PIL import Image, ImageOps
from starlette.middleware.trustedhost import TrustedHostMiddleware

from ..data.image_files import stamp
from ..data.images import open_image
from ..errors import UserError
from .explain import explain
from .index import Index
from .query import parse
from .results import Matches

_MOST = 300  # results of a query; their pictures are loaded as they are scrolled to
_MOST_ON_MAP, _MOST_LABELLED = 1500, 5000
_CLUSTERS = 10
_UPLOAD_BYTES, _UPLOAD_PIXELS = 20 * 2**20, 50_000_000
_NO_CUT = -6.0  # lower end of the slider: no cut-off
_THUMBNAIL, _LARGE = 320, 900
_COLOURS = ("4c78a8", "f58518", "e45756", "72b7b2", "54a24b", "eeca3b", "b279a2", "ff9da6", "9d755d", "7f7f7f")

_STYLE = """
.grid {display: grid; grid-template-columns: repeat(auto-fill, minmax(140px, 1fr)); gap: 10px}
.grid figure, .details figure {margin: 0; cursor: pointer}
.grid img {width: 100%; aspect-ratio: 1; object-fit: cover; border-radius: 8px; background: #8882; display: block}
.grid img:hover, .grid img:focus {outline: 3px solid #4c78a8}
.grid figcaption {font-size: 12px; opacity: .75; padding: 3px 2px; overflow: hidden; text-overflow: ellipsis;
  white-space: nowrap}
.details {display: flex; flex-wrap: wrap; align-items: flex-start; gap: 16px; margin-bottom: 16px}
.details > img {width: min(260px, 100%); height: auto; border-radius: 8px}
.details > div {flex: 1; min-width: 260px}
.details ul {margin: 4px 0 12px 18px; padding: 0}
.note {opacity: .7; font-size: 13px}
.map svg {width: 100%; max-height: 75vh; background: #8881; border-radius: 8px}
.map circle:hover {stroke: currentColor; stroke-width: 2}
.map .tip {position: fixed; pointer-events: none; z-index: 9; max-width: 200px; border-radius: 8px; display: none}
footer {display: none !important}
"""
# A click on a picture selects it; on the map, the picture under the pointer is shown
_SCRIPT = """
const chosen = event => {
  const picture = event.target.closest('[data-path]');
  if (picture) trigger('select', {value: picture.dataset.path});
};
element.addEventListener('click', chosen);
element.addEventListener('keydown', event => { if (event.key === 'Enter') chosen(event); });
element.addEventListener('mouseover', event => {
  const tip = element.querySelector('.tip');
  if (!tip) return;
  const point = event.target.closest('circle');
  tip.style.display = point ? 'block' : 'none';
  if (point) {
    tip.src = point.dataset.picture;
    tip.style.left = Math.min(event.clientX + 14, innerWidth - 210) + 'px';
    tip.style.top = Math.min(event.clientY + 14, innerHeight - 210) + 'px';
  }
});
"""


class Pictures:
    """Encoded pictures of indexed images; whatever else is asked for is not found."""

    def __init__(self, index: Index):
        self.index = index
        self.thumbnail = functools.lru_cache(2000)(self._thumbnail)
        self.explained = functools.lru_cache(100)(self._explained)

    def file(self, path: str) -> Path:
        """The file of an indexed image. Raises HTTPException where it is not indexed, or not as it was then."""
        record = self.index.store.record(path)
        if record is None:
            raise HTTPException(404, "not indexed")
        file = self.index.folder / path
        if stamp(file) != [record["size"], record["mtime_ns"]]:
            raise HTTPException(404, "gone, or changed since it was indexed")
        return file

    def _thumbnail(self, path: str, side: int) -> bytes:
        try:
            with open_image(self.file(path)) as image:
                image.draft("RGB", (side, side))
                image = ImageOps.exif_transpose(image).convert("RGB")
        except HTTPException:
            raise
        except Exception as error:  # decoders raise OSError, ValueError, SyntaxError and classes of their own
            raise HTTPException(404, "cannot be decoded") from error
        image.thumbnail((side, side))
        return _jpeg(image)

    def _explained(self, path: str, query: str) -> bytes:
        return _jpeg(Image.fromarray(explain(self.index.model, self.file(path), query).overlay()))


def build_page(index: Index) -> FastAPI:
    """The page as an application for an ASGI server such as uvicorn."""
    application, pictures = FastAPI(docs_url=None, redoc_url=None, openapi_url=None), Pictures(index)
    # A page of another site whose name was made to lead here is refused
    application.add_middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"])
    headers = {"Cache-Control": "private, max-age=600"}

    @application.get("/picture")
    def picture(path: str, large: bool = False) -> Response:
        content = pictures.thumbnail(path, _LARGE if large else _THUMBNAIL)
        return Response(content, media_type="image/jpeg", headers=headers)

    @application.get("/explained")
    def explained(path: str, query: str) -> Response:
        return Response(pictures.explained(path, query), media_type="image/jpeg", headers=headers)

    fonts = ["system-ui", "sans-serif"]  # Gradio's own come from another site
    theme = gr.themes.Base(font=fonts, font_mono=["monospace"], radius_size="lg")
    return gr.mount_gradio_app(
        application, _interface(index), path="/", server_name="127.0.0.1", theme=theme, css=_STYLE, show_error=True,
        max_file_size=_UPLOAD_BYTES, footer_links=[], ssr_mode=False, allowed_paths=[], mcp_server=False,
    )  # fmt: skip


def _interface(index: Index) -> gr.Blocks:
    with gr.Blocks(title="clip_scratch", analytics_enabled=False, delete_cache=(600, 3600), fill_width=True) as page:
        gr.Markdown(f"### {len(index):,} images in {index.folder.name}")
        with gr.Tab("Search"):
            with gr.Row():
                query = gr.Textbox(
                    placeholder="a dog on a beach + snow - people", label="Query", scale=3, autofocus=True
                )
                upload = gr.File(label="or an image", file_types=["image"], height=120, scale=1)
            with gr.Row():
                cut = gr.Slider(
                    _NO_CUT, 8, _NO_CUT, step=0.1, label="Least score", info="far left: no cut-off", scale=1
                )
                columns = ", ".join(index.columns)
                where = gr.Textbox(label="Only where", info=columns, placeholder="width > height", scale=2)
            details = gr.HTML(js_on_load=_SCRIPT, elem_id="details")
            grid = gr.HTML(js_on_load=_SCRIPT, elem_id="results")
        with gr.Tab("Map") as map_tab:
            drawn = gr.HTML('<p class="note">Computing the map ...</p>', js_on_load=_SCRIPT, elem_id="map")
        with gr.Tab("Labels"):
            labels = gr.Textbox(label="Labels, one a line", lines=4, placeholder="a dog\na child\na mountain")
            sort = gr.Button("Sort the images by label", variant="primary")
            sorted_grid = gr.HTML(js_on_load=_SCRIPT, elem_id="labels")

        def search(text: str, file: str | None, least: float, condition: str):
            return _results(index, text, file, least, condition), ""

        def show(event: gr.EventData, text: str, file: str | None):
            return _details(index, event._data["value"], "" if file else text)

        inputs = [query, upload, cut, where]
        gr.on(
            [query.submit, upload.change, cut.release, where.submit],
            search,
            inputs,
            [grid, details],
            trigger_mode="always_last",  # else what is asked while a search runs is dropped
            api_visibility="private",
        )
        for source in (grid, details):
            source.select(show, [query, upload], details, api_visibility="private")
        map_tab.select(functools.cache(lambda: _map(index)), None, drawn, api_visibility="private")
        sort.click(functools.partial(_labelled, index), labels, sorted_grid, api_visibility="private")
    return page


def _results(index: Index, text: str, file: str | None, least: float, where: str) -> str:
    """The grid for a query as typed or uploaded, or a sentence that says what is wrong with it."""
    least = None if least <= _NO_CUT else least
    try:
        if file:
            return _grid(index.search(_uploaded(file), _MOST, where, least))
        return _grid(index.search(text, _MOST, where, least)) if text.strip() else ""
    except UserError as error:
        return _note(str(error))


def _uploaded(file: str) -> Image.Image:
    """An uploaded image that is small enough to decode."""
    try:
        with open_image(file) as image:
            width, height = image.size
            if width * height <= _UPLOAD_PIXELS:
                image.load()
                return image
    except Exception as error:  # decoders raise OSError, ValueError, SyntaxError and classes of their own
        raise UserError("the file cannot be read as an image") from error
    raise UserError(f"the image has {width} x {height} pixels; at most {_UPLOAD_PIXELS // 10**6} million are taken")


def _note(text: str) -> str:
    return f'<p class="note">{html.escape(text)}</p>'


def _figure(path: str, caption: str) -> str:
    name = html.escape(path, quote=True)
    picture = f'<img src="/picture?path={quote(path)}" loading="lazy" tabindex="0" alt="{name}">'
    return (
        f'<figure data-path="{name}" title="{name}">{picture}<figcaption>{html.escape(caption)}</figcaption></figure>'
    )


def _grid(results: Matches) -> str:
    if not results:
        return _note("No image: move the cut-off to the left, or change the condition.")
    figures = (_figure(r["path"], f"{r['score']:.1f} · {Path(r['path']).name}") for r in results.records)
    return f'<div class="grid">{"".join(figures)}</div>'


def _details(index: Index, path: str, query: str) -> str:
    """A picture, where the query lies in it, its captions and the images most like it."""
    parts = [f'<img src="/picture?large=true&path={quote(path)}" alt="{html.escape(path, quote=True)}">']
    if query.strip() and len(parse(query)) == 1:
        source = f"/explained?path={quote(path)}&query={quote(query.strip())}"
        parts.append(f'<img class="explained" src="{source}" alt="where the query lies">')
    captions = index.find_captions(path, 5) if index.captions[0] else []
    items = [f"<li>{html.escape(text)} <span class='note'>{cosine:.2f}</span></li>" for text, cosine in captions]
    record = index.store.record(path)
    facts = [path, f"{record['width']} x {record['height']}", *filter(None, [record["date"]])]
    parts.append(f"<div><b>{html.escape(' · '.join(facts))}</b><ul>{''.join(items)}</ul></div>")
    similar = [_figure(r["path"], f"{r['cosine']:.2f}") for r in index.similar(path, 8).records]
    return (
        f'<div class="details">{"".join(parts)}</div><p class="note">Most like it</p>'
        f'<div class="grid">{"".join(similar)}</div><hr>'
    )


def _map(index: Index) -> str:
    """A scatter of the images: PCA, then t-SNE (van der Maaten and Hinton 2008), coloured by k-means cluster."""
    from sklearn.cluster import KMeans
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    paths, embeddings = index.store.sample(_MOST_ON_MAP)
    if len(paths) < 10:
        return _note("A map needs at least ten images.")
    points = PCA(min(50, *embeddings.shape), random_state=0).fit_transform(embeddings)
    clusters = KMeans(min(_CLUSTERS, len(paths)), n_init=3, random_state=0).fit_predict(points)
    places = TSNE(perplexity=min(30, len(paths) / 4), init="pca", random_state=0).fit_transform(points)
    places = 10 + 980 * (places - places.min(0)) / np.maximum(np.ptp(places, axis=0), 1e-9) * (1, 0.6)
    circles = "".join(
        f'<circle cx="{x:.0f}" cy="{y:.0f}" r="5" fill="#{_COLOURS[c]}" data-path="{html.escape(path, quote=True)}" '
        f'data-picture="/picture?path={quote(path)}"/>'
        for path, (x, y), c in zip(paths, places, clusters, strict=True)
    )
    note = f"{len(paths):,} of {len(index):,} images"
    return (
        f'<div class="map"><p class="note">{note}; near ones are alike, colours are clusters</p>'
        f'<svg viewBox="0 0 1000 608">{circles}</svg><img class="tip" alt=""></div>'
    )


def _labelled(index: Index, text: str) -> str:
    """The images under the label that each fits best, with its probability among the labels."""
    labels = list(dict.fromkeys(line.strip() for line in text.splitlines() if line.strip()))
    if len(labels) < 2:
        return _note("Give two labels or more, one a line.")
    paths, embeddings = index.store.sample(_MOST_LABELLED)
    logits = index.info["logit_scale"] * embeddings @ index.queries.text(labels).T  # (N, labels)
    shares = np.exp(logits - logits.max(1, keepdims=True))
    shares /= shares.sum(1, keepdims=True)
    best, parts = shares.argmax(1), []
    for i, label in enumerate(labels):
        own = np.flatnonzero(best == i)
        own = own[np.argsort(-shares[own, i], kind="stable")]
        figures = "".join(_figure(paths[k], f"{100 * shares[k, i]:.0f} %") for k in own[:24])
        parts.append(f"<h4>{html.escape(label)} · {len(own):,} images</h4><div class='grid'>{figures}</div>")
    return "".join(parts)


def _jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "jpeg", quality=85)
    return buffer.getvalue()
