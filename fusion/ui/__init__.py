"""The page at `/ui`: what people see of a gateway in a browser.

**How to add a page.** Write a file `NAME.py` and a template `NAME.html.jinja` beside it, in `fusion/ui/pages/` or, if
the page shows roles, runs or files, in `mixfuse/app/pages/`. The page is then at `/ui/NAME` and in the navigation;
nothing lists it.

    async def show(visit: Visit) -> Response:
        return await visit.page("NAME.html.jinja", things=[…])

    async def change(visit: Visit) -> Response:          # its CSRF token has been checked
        form = await visit.form()
        await visit.call("POST", "/v1/…", {…})           # the API, with the visitor's key and all of its checks
        return visit.to("/NAME")

    PAGE = Page("Title", order=40, gets={"": show, "/{id}": one}, posts={"/change": change})

- A template extends `base.html.jinja` and fills the block `main`. Everything is escaped; nothing is marked safe.
- The Content Security Policy allows no inline script and no `style` attribute. Rules go into `assets/ui.css`, behaviour
  into `assets/ui.js` or a file of the page's own beside them. A page is readable without JavaScript: links and forms.
- A form that changes anything has `method="post"` and `{{ csrf() }}` in it; the script sends the header `X-CSRF-Token`.
- Drawings are SVG that the server writes (`<rect class=… x=…>`), with a `<title>` and the figures beside them as text.
- `data-swap="ID"` on a form or a link replaces the element with that id instead of the whole page; `data-refresh="5"`
  on an element with an id fetches it again every five seconds.
- `visit.owner()` is the API key whose traces the visitor may see (None: all); pass it to every query.
- `mixfuse ui` leaves out the `posts` of a page, unless what they write is a file of the page's own (`writes_files`).
- `data-press="KEY"` on a button or a link gives it a key; `data-help` on an element is what `?` says of a page's keys.
- A `MixfuseError` becomes an error page with its status; a visitor without a key gets the login.
"""
