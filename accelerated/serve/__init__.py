"""A small web page on this computer: drop a picture, see its depth (or classes), where the model looks, and the scene in space.

    python -m accelerated.serve --weights FILE

`views` turns arrays into what the page shows, `page` lays it out and answers its events, `__main__` is the command and the
server. The page is made with Gradio (the extra `serve`); `cloud.js` draws the point cloud on a plain canvas.
"""
