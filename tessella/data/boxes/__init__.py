"""Images whose objects have boxes and masks: COCO and VOC formats, drawn shapes."""
