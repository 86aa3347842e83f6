"""Differentiable rendering and unwrapping of textured meshes.

==================  ====================================================================================
``renderer``        :class:`~lipflow.render.renderer.Renderer`: frames and views in, images and maps out
``camera``          rigid transforms, projection, meshes in the camera space of every view
``lens``            Brown-Conrady distortion, its inverse and the radius up to which it holds
``backend``         what a backend offers, and the conventions that all keep
``backend_choice``  which one is taken
``reference``       visibility and interpolation in plain torch, float64: the definition, slow
``cpu``             visibility on the CPU, by ``visibility`` (scan conversion) and ``interpolate`` (fused gradients)
``parallel``        threads of the CPU kernels
``software``        a backend out of ``reference`` or ``cpu``, ``texture`` and ``antialias``
``texture``         bilinear and mip-mapped look-up; ``texture_cpu`` its fused kernels for CPU tensors
``antialias``       blending across silhouettes, and its gradients
``outline``         blended outlines over a photo's own background, as photos are compared with
``cuda``            a backend out of nvdiffrast, on GPUs
``vertex_values``   values of the vertices, seen through a rendering's pixels
``unwrap``          the way back: photos into texture space
==================  ====================================================================================
"""
